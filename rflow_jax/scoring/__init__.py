"""What a verifier says of images that are there already: which images, the verdicts, the file that keeps them."""
