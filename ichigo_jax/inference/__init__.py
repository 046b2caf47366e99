"""Models to call: speech to codes and words, token ids to answers, and the assistant that joins them."""
