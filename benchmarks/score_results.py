"""Scores a results file with pycocotools alone, to check what a run printed.

python benchmarks/score_results.py annotations.json coco_instances_results.json
"""

import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

if __name__ == "__main__":
    truth = COCO(sys.argv[1])
    detections = truth.loadRes(sys.argv[2])
    for kind in ("segm", "bbox"):
        evaluation = COCOeval(truth, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
