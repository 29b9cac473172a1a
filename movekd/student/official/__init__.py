"""Read and write checkpoints in the format of the released MoVE-KD code."""
