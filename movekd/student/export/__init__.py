"""Write a student in formats that work without movekd: Hugging Face, ONNX; write its model card.

``modeling_movekd`` needs only torch and transformers. It is copied into every export, where
``trust_remote_code=True`` runs it. In a process that has movekd,
``movekd.student.register_auto_classes`` makes stock transformers use the same module.
"""
