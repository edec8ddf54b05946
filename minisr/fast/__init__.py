"""Drop-in replacements of core functions, faster."""
