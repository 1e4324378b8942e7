"""How an exported file is used without this harness: the programs of the model card.

In: nothing. Out: a section of Markdown for each kind of file. Invariants: the program for ONNX is that of launch/README.md,
which a test runs.
"""

ONNX = """
`python classify.py IMAGE ...`, beside `model.onnx`, with numpy, Pillow and onnxruntime:

```python
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
classes, points = json.loads(metadata["classes"]), json.loads(metadata["thresholds"])
for path in sys.argv[1:]:
    upright = ImageOps.exif_transpose(Image.open(path))
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    upright = upright.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright).convert("RGB")
    (probabilities,) = session.run(None, {"images": np.asarray(image)[None]})[0].tolist()
    named = dict(zip(classes, probabilities))
    print(path, max(named, key=named.get), json.dumps(named))
    for point in points:  # positive: one class, or several joined by +
        positive = point["positive"]
        score = sum(named[name] for name in ([positive] if positive in named else positive.split("+")))
        verdict = "at least" if score >= point["threshold"] else "below"
        print(f"  {positive}: {score:.4f}, {verdict} {point['threshold']}")
```

Transparency is laid on black, as in training. Colour profiles are not applied: convert images that have one to sRGB first.
"""

ONNX_OUTSIDE = """
```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(probabilities,) = session.run(None, {"images": views})  # views: (N, 3, S, S) float32, normalised
```
"""

TORCH = """
```python
import json

import torch

words = {"metadata.json": ""}
model = torch.export.load("model.pt2", extra_files=words).module()
classes = json.loads(json.loads(words["metadata.json"])["classes"])
with torch.no_grad():
    probabilities = model(images)  # the input is described above
```
"""

SAFETENSORS = """
`model.safetensors` has the tensors under the names of the model library that `config.json` names. With timm's models:

```python
import timm

model = timm.create_model("local-dir:PATH/TO/FOLDER", pretrained=True).eval()
```

With torchvision's:

```python
import json

import torchvision
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = torchvision.models.get_model(config["architecture"], num_classes=config["num_classes"]).eval()
model.load_state_dict(load_file("model.safetensors"))
```

The logits are divided by the temperature of the metadata before the softmax.
"""

USES = {"onnx": ONNX, "onnx-outside": ONNX_OUTSIDE, "torch": TORCH, "safetensors": SAFETENSORS}
