"""Results for people: tables for the terminal, plots as PNG, and the model card, all by one way of writing numbers."""
