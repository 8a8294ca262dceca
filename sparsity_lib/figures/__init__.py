"""Figures of the chapters: data in, a matplotlib figure out, all in the book's one style."""
