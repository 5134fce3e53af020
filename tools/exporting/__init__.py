"""What `tools/export.py` does, by subject.

forms.py     writes the network in each form
int8.py      quantises it, and measures what that costs in accuracy
measure.py   compares a written network with PyTorch's, and times both
hub.py       a folder for the Hugging Face Hub: its model card, and the upload
"""
