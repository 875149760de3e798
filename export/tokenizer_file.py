"""Moved to tclkit.tcl.tokenizer_file: training needs it, and tcl may not import export."""

from tclkit.tcl.tokenizer_file import clip_tokenizer_json, pruned_tokenizer_json, vocabulary_size

__all__ = ["clip_tokenizer_json", "pruned_tokenizer_json", "vocabulary_size"]
