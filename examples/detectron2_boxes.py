"""detectron2's own trainer, data loaders and evaluator around this network and its criterion.

    python examples/detectron2_boxes.py --config-file configs/coco/boxinst_R50_bs16_50ep.yaml --num-gpus 8

takes the flags of detectron2's train_net.py and the data sets of its catalogue. It needs detectron2.
"""

import argparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch

from sim_m2f.integrations.detectron2 import SIMTrainer, add_sim_config


def configuration(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_sim_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.META_ARCHITECTURE = "SIMMask2Former"
    cfg.SOLVER.AMP.ENABLED &= torch.cuda.is_available()
    return cfg


def main(args: argparse.Namespace) -> None:
    """Train, or evaluate with --eval-only."""
    cfg = configuration(args)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = SIMTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if args.eval_only:
        SIMTrainer.test(cfg, trainer.model)
    else:
        trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
