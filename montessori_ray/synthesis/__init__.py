"""Writing instructions and responses: few-shot prompts, parsing and filters, deduplication, the teacher pool."""
