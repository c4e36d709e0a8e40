"""Data sets of other tools, from and to COCO's records.

Each format is a small file here: globox, which reads boxes of many tools, has no masks, no Label Studio and
no plain CSV, and does not say in which file a fault is; docs/data.md says what other libraries lack. The
tests read what is written here with globox (boxes), supervision (LabelMe, YOLO), datumaro (CVAT) and
label-studio-converter: see the extra ``formats``.
"""
