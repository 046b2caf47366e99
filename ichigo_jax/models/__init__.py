"""The models, what they are built of, and the folder that they are kept in."""
