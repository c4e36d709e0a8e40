"""timm's pretrained weights for the backbone: ``timm://NAME``."""

import timm

from sim_m2f.errors import UserError, first_line
from sim_m2f.modeling.backbone import TimmBackbone, feature_info
from sim_m2f.weights.load import COMPUTED, LoadReport
from sim_m2f.weights.names import BODY

TIMM = "timm://"


def load_timm_backbone(backbone: TimmBackbone, name: str) -> LoadReport:
    """Take timm's pretrained weights ``name``, such as "resnet50.tv_in1k".

    They are downloaded once, without timm's classifier, and have to fit completely.

    Raises:
        UserError: timm has no such weights, they cannot be downloaded, or they are of another backbone.
    """
    try:
        indices = tuple(feature_info(backbone.body).out_indices)
        pretrained = timm.create_model(name, pretrained=True, features_only=True, out_indices=indices)
    except Exception as error:  # timm's ways of downloading raise errors of many libraries
        advice = "set MODEL.WEIGHTS to a file or to ''"
        raise UserError(f"{TIMM}{name}: cannot be loaded ({first_line(error)}); {advice}") from error
    weights, own = pretrained.state_dict(), backbone.body.state_dict()
    unfit = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    surplus = [key for key in weights if key not in own and not COMPUTED.search(key)]
    if unfit or surplus:
        numbers = f"{len(unfit)} do not fit, {len(surplus)} are too many (such as {(unfit or surplus)[0]})"
        fault = f"another backbone than {backbone.name}: {numbers}"
        raise UserError(f"{TIMM}{name}: {fault}; check MODEL.BACKBONE")
    backbone.body.load_state_dict({key: weights[key] for key in own})
    return LoadReport(f"{TIMM}{name}", "backbone (timm)", [BODY + key for key in own], [], {}, [], [])
