"""Recipes: one YAML file per job, and the scripts that trained what the package ships."""
