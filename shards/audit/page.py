"""The pairs of an audit to look at: both images, and one laid on the other.

In: pairs and their table. Out: one HTML file that needs no network. Invariants: no text of a source gets into the page unescaped.
"""

import base64
from html import escape

import cv2  # pyright: ignore[reportMissingImports] - an extra
import numpy as np
import pandas as pd

from shards.audit.collection import Collection
from shards.audit.features import SIDE, Features, scaled_size
from shards.audit.pairs import Pair
from shards.image import open_rgb

MAX_SHOWN = 250
HEAD = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>Audit</title><style>
:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:76rem}
h1{font-size:1.4rem}table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left}td{font-variant-numeric:tabular-nums}
article{border-top:1px solid #8886;padding:1rem 0}h2{font-size:1rem;margin:0 0 .5rem}.leak{background:#c80;color:#000;border-radius:.2rem;padding:0 .35rem}
.row{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.8rem}@media(max-width:40rem){.row{grid-template-columns:1fr 1fr}.row figure:last-child{grid-column:1/3}}
figure{margin:0}img{width:100%;display:block;background:#000}figcaption{font-size:.82rem;overflow-wrap:anywhere}
.lay{position:relative}.lay img+img{position:absolute;inset:0;height:100%;clip-path:inset(0 0 0 var(--cut,50%))}.lay.other img+img{clip-path:none}
.tools{display:flex;gap:.6rem;align-items:center}.tools input{flex:1}.note{font-size:.9rem}
</style>"""
SCRIPT = """<script>
document.addEventListener('input',e=>e.target.closest('figure').querySelector('.lay').style.setProperty('--cut',e.target.value+'%'));
document.addEventListener('click',e=>{if(!e.target.matches('button'))return;const lay=e.target.closest('figure').querySelector('.lay');
if(lay.timer){clearInterval(lay.timer);lay.timer=0;lay.classList.remove('other');lay.style.setProperty('--cut','50%')}
else{lay.style.setProperty('--cut','100%');lay.timer=setInterval(()=>lay.classList.toggle('other'),500)}});
</script>"""


def write_page(
    pairs: list[Pair], table: pd.DataFrame, collection: Collection, features: Features, summary: dict
) -> bytes:
    """The page, of the first `MAX_SHOWN` pairs."""
    shown = min(len(pairs), MAX_SHOWN)
    parts = [
        HEAD,
        f"<h1>{summary['pairs']} pairs of images under different names show one thing; {summary['leaks']} leak between splits</h1>",
        f"<p class=note>{summary['images']} images of {escape(', '.join(dict.fromkeys(collection.table['data'])))}. A pair counts "
        f"as found from {summary['threshold']} key points that agree on one shift, turn and scale; {summary['undecided']} "
        f"weaker ones are listed below those. Correct the column <code>same</code> of audit.csv, and pack again with "
        f"<code>--merge-duplicates audit.csv</code>. The first {shown} are shown.</p>",
        "<table><tr><th>splits<th>pairs</tr>",
        *(f"<tr><td>{escape(name)}<td>{number}</tr>" for name, number in summary["splits"].items()),
        "</table>",
        *(
            _article(pair, row, collection, features)
            for pair, row in zip(pairs[:shown], table.head(shown).to_dict("records"), strict=True)
        ),
        SCRIPT,
    ]
    return "\n".join(parts).encode()


def _article(pair: Pair, row: dict, collection: Collection, features: Features) -> str:
    one, other = (_image(collection, index) for index in (pair.a, pair.b))
    leak = " <span class=leak>leak</span>" if row["leak"] else ""
    if pair.kind == "alike":
        said = f"{row['inliers']} key points agree, correlation {row['correlation']:.2f}, {row['scale']:.2f} times as large"
        said += f", turned by {row['angle']:.0f}°" if abs(row["angle"]) >= 1 else ""
        said += ", mirrored" if row["mirrored"] else ""
    else:
        said = {
            "group": "one group in two splits",
            "bytes": "the same file",
            "pixels": "the same pixels in another file",
        }[pair.kind]
    known = f"Both have the same {escape(row['agree'])}. " if row["agree"] else ""
    known += f"Different: {escape(row['differ'])}." if row["differ"] else ""
    return (
        f"<article><h2>{row['rank']}. {said}{leak}</h2><div class=row>{_figure(one, row, 'a')}{_figure(other, row, 'b')}"
        f"{_laid(one, other, pair, features)}</div><p class=note>{known}</p></article>"
    )


def _figure(image: np.ndarray, row: dict, end: str) -> str:
    words = [row[f"image_id_{end}"], row[f"group_{end}"], row[f"label_{end}"], row[f"split_{end}"]]
    return f"<figure>{_tag(image)}<figcaption>{escape(', '.join(filter(None, words)))}</figcaption></figure>"


def _laid(one: np.ndarray, other: np.ndarray, pair: Pair, features: Features) -> str:
    """Image b as it lies on a, with a slider between them."""
    height, width = one.shape[:2]
    if pair.alignment.mirrored:
        other = np.ascontiguousarray(other[:, ::-1])
    if pair.alignment.matrix is None:
        moved = cv2.resize(other, (width, height), interpolation=cv2.INTER_AREA)
    else:
        moved = cv2.warpAffine(
            other, pair.alignment.matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
    return (
        f"<figure><div class=lay>{_tag(one)}{_tag(moved)}</div><div class=tools><input type=range min=0 max=100 value=50 "
        "aria-label='how much of each image'><button>blink</button></div></figure>"
    )


def _image(collection: Collection, row: int) -> np.ndarray:
    """An image in the size in which it was compared: (h, w, 3) uint8; a grey square where it cannot be read."""
    try:
        rgb = np.asarray(open_rgb(collection.read(row), ""))
    except (ValueError, OSError):
        return np.full((SIDE, SIDE, 3), 128, np.uint8)
    return cv2.resize(rgb, scaled_size(rgb), interpolation=cv2.INTER_AREA)


def _tag(image: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return f'<img loading=lazy alt="" src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}">'
