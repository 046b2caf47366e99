"""Examples of speech and conversations, packed and loaded in batches; the synthetic corpus."""
