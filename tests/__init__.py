"""Tests, a folder for every folder of the project."""
