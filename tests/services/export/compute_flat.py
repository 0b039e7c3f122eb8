"""Computes logits with modelling code alone: torch, and no transformers and nothing of this project.

    python -I compute_flat.py FOLDER

FOLDER holds packages of flat files, and `cases.pt`: [(package, configuration, weights, tokens)]. Writes `logits.pt` beside.
"""

import importlib
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
torch.set_num_threads(1)
logits = []
for package, config, weights, tokens in torch.load(folder / "cases.pt", weights_only=False):
    code = importlib.import_module(f"{package}.decay_core_model")
    model = code.DecayLinearTransformer(code.ModelConfig.from_dict(config))
    model.load_state_dict(weights)
    with torch.no_grad():
        logits.append(model(tokens))
foreign = {name.split(".")[0] for name in sys.modules} & {"decay_core", "kernels", "services", "transformers"}
assert not foreign, foreign
torch.save(logits, folder / "logits.pt")
