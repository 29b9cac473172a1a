"""The student as stock transformers loads it, with and without movekd.

``configuration_movekd`` and ``modeling_movekd`` need torch and transformers alone: they are copied
into every export and are the code that ``trust_remote_code=True`` runs. With movekd imported, the
same two modules are registered with transformers, and nothing need be trusted.
"""
