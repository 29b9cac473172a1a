"""What a vision encoder is worth without a language model: kNN and a linear probe."""

__all__: list[str] = []  # import from the modules: this package loads none of them
