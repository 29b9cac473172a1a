"""Ask a trained model questions and score its answers.

``chat`` answers one question, ``generate`` many, ``benchmarks`` runs the benchmarks of LLaVA's
evaluation, and ``exact_match`` scores a LLaVA-style file by question type. Scoring loads no torch.
"""

__all__: list[str] = []  # import from the modules: this package loads none of them
