"""Measurements of our code: parity with stored references, speed, image quality; one suite a file."""
