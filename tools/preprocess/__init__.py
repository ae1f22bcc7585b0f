"""Command lines that build, score and show aligned datasets."""
