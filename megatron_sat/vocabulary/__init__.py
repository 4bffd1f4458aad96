"""Vocabulary extension: more pieces in a Hugging Face folder's tokenizer, and rows for them."""

from megatron_sat.vocabulary.extension import Report, TextReport, extend_vocabulary, read_pieces

__all__ = ["Report", "TextReport", "extend_vocabulary", "read_pieces"]
