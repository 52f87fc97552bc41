"""What importing the package does to peft and transformers: it registers a method, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import accelerate, peft, peft.functional, peft.helpers, transformers, transformers.integrations.peft
import transformers.pytorch_utils, transformers.trainer, transformers.trainer_callback


def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("peft", "transformers", "accelerate", "torch"):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(name, attribute, own): v for own, v in list(vars(value).items())}
    return found


before = attributes()
registered = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
import mos_kernels.huggingface
after = attributes()
changed = [name for name, value in before.items() if name not in after or after[name] is not value]
added = [name for name in after if name not in before and (len(name) == 3 and name[:2] in before)]
print(sorted(changed))
print(sorted(added))
print(sorted(set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) - set(registered)))
"""


@pytest.mark.budget(15)  # a process of its own
def test_importing_changes_no_attribute_of_peft_or_transformers():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed, added, registered = done.stdout.splitlines()[-3:]
    assert changed == "[]"
    assert added in ("[]", "[('peft.utils.peft_types', 'PeftType', 'MOSELORA')]")  # an attribute since Python 3.12
    assert registered == "[<PeftType.MOSELORA: 'MOSELORA'>]"
