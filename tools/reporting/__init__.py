"""The parts of tools/report.py: run folders, evaluations and pictures go in, a page comes out."""
