"""The configuration: inheritance, overrides, types, and a comment at every key."""

import copy
import re

import pytest
import torch
import yaml
from conftest import ROOT, SMALL_FILE
from mutations import ODD

import sim_m2f
from sim_m2f.config import CfgNode, cfg_from_text, extent_warning, validate, value_of
from sim_m2f.config.checks import range_of
from sim_m2f.config.defaults import WITHOUT_EFFECT, read_yaml
from sim_m2f.config.node import leaf_keys
from sim_m2f.errors import UserError
from sim_m2f.structures import Prompts
from sim_m2f.supervision.schedule import ramp_up, resolve_steps, term_weight

ONLY_CHOICE = read_yaml(ROOT / "sim_m2f/config/limits.yaml")["ONLY_CHOICE"]
ENCODED = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"


@pytest.mark.parametrize("name", ["defaults.yaml", "without_effect.yaml"])
def test_every_key_is_documented_where_its_default_is(name):
    text = (ROOT / "sim_m2f/config" / name).read_text()
    lines = text.splitlines()

    def undocumented(node: yaml.MappingNode) -> list[str]:
        found = []
        for key, value in node.value:
            at = key.start_mark.line
            if isinstance(value, yaml.MappingNode):
                found += undocumented(value)
            elif not (re.search(r"  # .{8,}", lines[at]) or lines[at - 1].lstrip().startswith("# ")):
                found.append(key.value)
        return found

    assert undocumented(yaml.compose(text)) == []


@pytest.mark.slow
def test_every_config_file_loads():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        sim_m2f.get_cfg().merge_from_file(file)


def test_base_files_are_inherited_and_overridden(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nSEED: 3\n")
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\n")
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(tmp_path / "child.yaml")
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SEED) == (0.5, 9, 3)


def test_overrides_take_the_type_of_the_default():
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", "1", "DATASETS.TEST", "shapes_val", "OUTPUT_DIR", "7"])
    cfg.merge_from_list(
        ["SOLVER.STEPS", "(5, 0.9)", "DATASETS.TRAIN", "('a', 'b')", "MODEL.PIXEL_STD", "(1, 2, 3)"]
    )
    assert cfg.SOLVER.BASE_LR == 1.0
    assert isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.DATASETS.TEST == ("shapes_val",)
    assert cfg.OUTPUT_DIR == "7"
    assert cfg.SOLVER.STEPS == (5, 0.9)
    assert cfg.DATASETS.TRAIN == ("a", "b")
    assert cfg.MODEL.PIXEL_STD == [1, 2, 3]


def test_a_tuple_that_was_empty_keeps_the_type_of_its_elements():
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "()", "TRACKERS", "()"])
    cfg.merge_from_list(["SOLVER.STEPS", "(100,)", "TRACKERS", "('wandb',)"])
    assert (cfg.SOLVER.STEPS, cfg.TRACKERS) == ((100,), ("wandb",))
    cfg.merge_from_list(["SOLVER.STEPS", "()"])
    with pytest.raises(UserError, match=r"SOLVER\.STEPS\[0\] takes a"):
        cfg.merge_from_list(["SOLVER.STEPS", "('a',)"])


def test_a_written_configuration_reads_back(tmp_path):
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/sim_R18.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = sim_m2f.get_cfg()
    again.merge_from_file(tmp_path / "config.yaml")
    assert again == cfg


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASELR", "SOLVER.BASE_LR"),
        ("MODEL.SIM.PAIRWISE.TRESHOLD", "MODEL.SIM.PAIRWISE.COLOR_THRESHOLD"),
        ("MAX_ITER", "SOLVER.MAX_ITER"),
        ("MODEL.NUM_CLASSES", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(UserError, match=re.escape(f"unknown key {key}; did you mean {nearest}?")):
        sim_m2f.get_cfg().merge_from_list([key, "1"])


def test_steps_may_be_fractions_of_the_run():
    assert resolve_steps(10000.0, 368750) == 10000
    assert resolve_steps(0.25, 1000) == 250
    assert [ramp_up(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp_up(0, 0) == 1
    growing = CfgNode({"WEIGHT": 3.0, "START": 0.25, "WARMUP": 4.0})
    assert [term_weight(growing, step, 16) for step in (0, 3, 4, 5, 8, 16)] == [0, 0, 0, 0.75, 3, 3]
    fading = CfgNode({"WEIGHT": 3.0, "STEPS": 2.0})
    assert [term_weight(fading, step, 16) for step in range(4)] == [3, 1.5, 0, 0]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("INPUT.RANDOM_FLIP", "horizontl", "'horizontl' does not exist; take horizontal, vertical or none"),
        ("MODEL.RESNETS.NORM", "LN", "'LN' does not exist; take FrozenBN, BN, SyncBN or GN"),
        ("MODEL.SIM.SUPERVISION", "points", "'points' does not exist; take box, mixed or mask"),
        ("TRACKERS", ("tensorboard", "visdom"), "'visdom' does not exist"),
        ("MODEL.DEVICE", "cuda:1", "take auto, cpu or cuda"),
        ("SOLVER.OPTIMIZER", "SGD", "the only choice is 'ADAMW'"),
        ("MODEL.SWIN.PATCH_SIZE", 2, "2 does not exist here; the only choice is 4"),
        ("MODEL.SWIN.EMBED_DIM", 1, "is 1; use a number of at least 8"),
        ("INPUT.IMAGE_SIZE", 0, "is 0; use a number of at least 1"),
        ("SOLVER.IMS_PER_BATCH", 0, "is 0; use a number of at least 1"),
        ("SEED", -1, "is -1; use a number of at least 0"),
        ("DATALOADER.NUM_WORKERS", -1, "is -1; use a number of at least 0"),
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 48, "is 48; use a multiple of 32"),
        (ENCODED, ["res2", "res3", "res4", "res5"], "give 3 different names in ascending order"),
        (ENCODED, ["res4", "res5"], "give 3 different names in ascending order"),
        (ENCODED, ["res5", "res4", "res3"], "give 3 different names in ascending order"),
        (ENCODED, ["res3", "res3", "res4"], "give 3 different names in ascending order"),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 30, "is 30; use a multiple of 4"),
        ("INPUT.MIN_SCALE", 0.0, "is 0.0, INPUT.MAX_SCALE 2.0; use 0 < MIN_SCALE <= MAX_SCALE"),
        ("INPUT.MIN_SCALE", 3.0, "is 3.0, INPUT.MAX_SCALE 2.0; use 0 < MIN_SCALE <= MAX_SCALE"),
    ],
)
def test_values_that_cannot_be_are_told(key, value, words):
    cfg = sim_m2f.get_cfg()
    validate(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=re.escape(words)) as error:
        validate(cfg)
    assert key in str(error.value)


def test_what_the_decoder_has_no_layers_for_is_told():
    """The least that passes is built and computed with."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list(["MODEL.SIM.PROMPTS.ENABLED", True, "MODEL.MASK_FORMER.DEC_LAYERS", 1])
    with pytest.raises(UserError, match=r"PROMPTS\.ENABLED: .*DEC_LAYERS of at least 2") as error:
        validate(cfg)
    assert "\n" not in str(error.value)
    cfg.merge_from_list(["MODEL.MASK_FORMER.DEC_LAYERS", 2, ENCODED, ["res2", "res3", "res5"]])
    cfg.merge_from_list(["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 4])
    prompts = Prompts(torch.tensor([[[0.1, 0.2, 0.7, 0.8]]]), torch.zeros(1, 1, dtype=torch.int64))
    outputs = sim_m2f.build_model(cfg)(torch.zeros(1, 3, 36, 44), prompts=prompts)
    assert outputs["pred_masks"].shape == (1, 8, 9, 11)
    assert outputs["prompted"]["pred_masks"].shape == (1, 1, 9, 11)


def test_every_number_has_a_range_that_holds_its_default():
    cfg = sim_m2f.get_cfg()
    for key in leaf_keys(cfg):
        value = value_of(cfg, key)
        each = value if isinstance(value, (list, tuple)) else [value]
        if {type(one) for one in each} & {int, float} and key not in {
            "VERSION",
            *ONLY_CHOICE,
            *WITHOUT_EFFECT,
        }:
            least, most = range_of(key)
            assert all(least <= one <= most for one in each), key


@pytest.mark.slow
def test_an_odd_value_of_any_key_is_taken_or_told_in_one_line():
    cfg, said = sim_m2f.get_cfg(), []
    validate(cfg)
    for key in leaf_keys(cfg):
        *groups, name = key.split(".")
        group = value_of(cfg, ".".join(groups)) if groups else cfg
        default = group[name]
        for odd in ODD:
            try:
                group.merge_values({name: copy.deepcopy(odd)}, "odd")
                validate(cfg)
            except UserError as error:
                said.append(str(error))
            group[name] = default
    assert len(said) > 1000
    assert not [text for text in said if len(text.splitlines()) != 1]


@pytest.mark.parametrize(("low", "high", "warned"), [(1.6, 2.4, True), (0.1, 2.0, False), (0.3, 0.7, True)])
def test_extents_far_apart_are_told(low, high, warned):
    cfg = sim_m2f.get_cfg()
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = low, high
    assert bool(extent_warning(cfg)) == warned
    assert "\n" not in extent_warning(cfg)


@pytest.mark.slow
def test_no_configuration_tests_on_other_extents_than_it_trains_on():
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        cfg = sim_m2f.get_cfg()
        cfg.merge_from_file(file)
        assert extent_warning(cfg) == "", file


@pytest.mark.parametrize("text", ["", "[1]", "SEED"])
def test_a_checkpoints_configuration_that_is_no_mapping_is_refused(text):
    with pytest.raises(UserError, match=r"model\.pth: its configuration is no mapping"):
        cfg_from_text(text, "model.pth")
