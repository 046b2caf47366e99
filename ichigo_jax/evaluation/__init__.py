"""How good a result is: text against text, and how a codebook is used."""
