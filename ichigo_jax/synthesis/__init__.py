"""Speech made from text: voices, the sentences they say, and corpora of both."""
