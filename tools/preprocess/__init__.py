"""Command lines that make, score and show aligned datasets."""
