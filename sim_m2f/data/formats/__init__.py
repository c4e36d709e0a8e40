"""Data sets of other tools, from and to COCO's records.

Of the kept libraries, globox reads boxes alone, neither Label Studio nor plain CSV, and does not say in which
file a fault is; supervision reads two of the formats and drops ids; datumaro brings forty packages. So each
format is a small file here; the tests read what is written back with those libraries.
"""
