"""Checkpoints of other kinds: Hugging Face folders in and out, and DeepSpeed's files offline."""
