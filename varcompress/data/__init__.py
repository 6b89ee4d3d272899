"""Image folders, the token store, and the embedded digits."""
