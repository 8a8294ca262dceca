"""What the book's build computes itself: pages on claims and provenance, the choice of a method, the explorer, the API."""
