"""Data sets of other tools, from and to COCO's records.

Each format is a small file here: globox, which reads boxes of many tools, has no masks, no Label Studio and
no plain CSV, and does not say in which file a fault is. The tests read boxes that are written here with
globox, where it is installed.
"""
