"""Pascal VOC: an XML per image (http://host.robots.ox.ac.uk/pascal/VOC/)."""

from pathlib import Path
from xml.etree import ElementTree

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import Collected, Record
from sim_m2f.errors import UserError


def read_voc(path: Path, images: Path, limits: CfgNode) -> Record:
    """A folder of XML files, or one. Corners are taken as edges, as LabelImg and most tools write them.

    Images lie in the folder or below, as the XML files do or by the only name, which may lack its end.

    Raises:
        UserError: a file is none of VOC's; names it.
    """
    data = Collected(images, limits)
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        try:
            root = ElementTree.parse(file).getroot()
            size = int(_text(root, "size/width")), int(_text(root, "size/height"))
            below, name = file.parent.relative_to(path) if path.is_dir() else Path(), _text(root, "filename")
            data.add_image(data.find((below / name).as_posix(), name), size)
            for item in root.iter("object"):
                corners = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                data.add_box(_text(item, "name"), corners)
        except (OSError, LookupError, ElementTree.ParseError, ValueError) as error:
            raise UserError(f"{file}: no VOC XML ({error}); correct it or take it out") from error
    return data.content(path)


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"no {path}")
    return text
