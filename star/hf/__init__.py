"""Found models as models of transformers: `import star.hf`, then every Auto class knows them.

    from star.hf import StarForCausalLM
    model = StarForCausalLM.from_pretrained("export/")    # or AutoModelForCausalLM, without remote code
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=50)

`star export` writes such directories. Needs the extra `hf` (transformers).
"""

from transformers import AutoConfig, AutoModelForCausalLM

from star.hf.cache import StarCache
from star.hf.configuration import StarConfig
from star.hf.modeling import StarForCausalLM

__all__ = ["StarCache", "StarConfig", "StarForCausalLM"]

AutoConfig.register(StarConfig.model_type, StarConfig, exist_ok=True)
AutoModelForCausalLM.register(StarConfig, StarForCausalLM, exist_ok=True)
