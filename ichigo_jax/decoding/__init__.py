"""One engine that writes text token by token, for Llama and for Whisper's decoder."""
