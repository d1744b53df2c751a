"""The SD-DiT network: a masked DiT encoder with a [CLS] token, and a light DiT decoder (Sec. 3.2-3.3, Fig.
2).

The model is EDM's raw network F (supplementary, Eq. 1): it takes the input scaled by c_in and the timestep
c_noise. The scheduler turns its output into the denoised image D. A flow's network is the same, of x_t and
1000 t. This file imports only torch, diffusers and safetensors, so a plain copy of it beside the weights is
enough to load them. Nobody mends such copies: private names of diffusers are imported where they are used.

Shapes: b batch, c channels, h x w pixels of the sample, n patches, k visible patches (k = n without a mask),
D encoder width, E decoder width, p patch size. Token 0 of the encoder is [CLS].
"""

import json
import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# A network's settings that leave the timestep as it is. Weights do not tell them, and 0.1.0 had none.
PLAIN_TIME = {"timestep_scale": 1.0, "timestep_shift": 0.0}


@dataclass
class SDDiTTransformer2DOutput(BaseOutput):
    """What a [`PatchTransformer2DModel`] returns.

    Attributes:
        sample: raw network output F, `[b, out_channels, h, w]`; None for a model without decoder.
        encoder_hidden_states: the encoder's tokens, `[b, 1 + k, D]` with [CLS] first; `[b, k, D]` from a
            model without [CLS].
    """

    sample: Tensor | None
    encoder_hidden_states: Tensor


class SDDiTAttnProcessor:
    """Self-attention through diffusers' dispatcher, so that `set_attention_backend` reaches it."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SDDiTAttention", hidden_states: Tensor) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        return attn.to_out[0](self.attend(query, key, value).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All are `[b, tokens, heads, head_dim]`."""
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class SDDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases, as in DiT; `[b, tokens, dim]` to the same."""

    _default_processor_cls = SDDiTAttnProcessor
    _available_processors = [SDDiTAttnProcessor]

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.use_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, since LoRA tools look for `to_out.0`
        self.set_processor(SDDiTAttnProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class AdaLayerNorm(nn.Module):
    """LayerNorm without weights of its own, shifted and scaled by the condition; zero at the start."""

    def __init__(self, dim: int, conditioning_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(conditioning_dim, 2 * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return modulate(self.norm(hidden_states), shift, scale)


class SDDiTBlock(nn.Module):
    """DiT block with adaLN-Zero (Peebles & Xie 2023, Fig. 3): `[b, tokens, dim]` and `temb` `[b, D]` to the
    same.

    The condition keeps the encoder's width D in the narrower decoder too.
    """

    def __init__(self, dim: int, num_attention_heads: int, mlp_ratio: float, conditioning_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SDDiTAttention(dim, num_attention_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = nn.Sequential(
            nn.Linear(dim, int(dim * mlp_ratio)),
            nn.GELU(approximate="tanh"),
            nn.Linear(int(dim * mlp_ratio), dim),
        )
        self.modulation = nn.Linear(conditioning_dim, 6 * dim)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(temb)).unsqueeze(1)  # [b, 1, 6 dim]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_msa, scale_msa))
        hidden_states = hidden_states + gate_msa * attended
        transformed = self.ff(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + gate_mlp * transformed


def register_block() -> None:
    """Lets diffusers' block caches (FirstBlockCache, MagCache, TaylorSeer, ...) know what a block returns."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:  # only these caches need it
        return
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(SDDiTBlock, metadata)


register_block()


class SinCosPositions(nn.Module):
    """Fixed 2-D sine-cosine positions; a grid unlike the trained one spans the same coordinates."""

    def __init__(self, dim: int, base_size: int):
        super().__init__()
        self.dim, self.base_size = dim, base_size
        self.register_buffer("table", self._compute(base_size, base_size), persistent=False)

    def _compute(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        rows, columns = (
            get_1d_sincos_pos_embed_from_grid(
                self.dim // 2,
                torch.arange(n, device=device, dtype=torch.float32) / (n / self.base_size),
                output_type="pt",
            ).float()
            for n in (height, width)
        )
        grid = torch.cat([columns.expand(height, -1, -1), rows.unsqueeze(1).expand(-1, width, -1)], dim=-1)
        return grid.flatten(0, 1)  # [n, dim]

    def forward(self, height: int, width: int) -> Tensor:
        # A graph for all sizes has no branch for one.
        if not torch.compiler.is_exporting() and height == width == self.base_size:
            return self.table
        return self._compute(height, width, self.table.device).to(self.table.dtype)


class SDDiTDecoder(nn.Module):
    """The light decoder G: the complete token set H to an image-shaped output (Sec. 3.3).

    # Paper silent: widths and the way of [CLS] into the decoder follow from the parameter counts (see
    # docs/paper.md). MaskDiT's decoder is the same without [CLS] (`has_cls=False`).
    """

    def __init__(
        self, dim: int, num_layers: int, heads: int, head_dim: int, mlp_ratio: float, base_size: int,
        patch_size: int, out_channels: int, has_cls: bool = True,
    ):  # fmt: skip
        super().__init__()
        width = heads * head_dim
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        if has_cls:
            self.cls_norm = nn.LayerNorm(dim, eps=1e-6)
            self.cls_proj = nn.Linear(dim, dim)
        self.norm_in = AdaLayerNorm(dim, dim)
        self.proj_in = nn.Linear(dim, width)
        self.pos_embed = SinCosPositions(width, base_size)
        self.blocks = nn.ModuleList([SDDiTBlock(width, heads, mlp_ratio, dim) for _ in range(num_layers)])
        self.norm_out = AdaLayerNorm(width, dim)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def forward(self, hidden_states: Tensor, cls: Tensor, temb: Tensor, height: int, width: int) -> Tensor:
        """`[b, n, D]`, [CLS] `[b, D]`, `temb` `[b, D]` and the grid's size to `[b, out_channels, h, w]`."""
        temb = temb + self.cls_proj(self.cls_norm(cls))
        return self.denoise(self.narrow(hidden_states, temb), temb, height, width)

    def narrow(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Tokens of the encoder's width to the decoder's, `[b, ., D]` to `[b, ., E]`."""
        return self.proj_in(self.norm_in(hidden_states, temb))

    def denoise(self, hidden_states: Tensor, temb: Tensor, height: int, width: int) -> Tensor:
        """All tokens `[b, n, E]`, which get their positions here, to `[b, out_channels, h, w]`."""
        hidden_states = hidden_states + self.pos_embed(height, width).to(hidden_states.dtype)
        for block in self.blocks:
            hidden_states = run_block(self, block, hidden_states, temb)
        hidden_states = self.proj_out(self.norm_out(hidden_states, temb))  # [b, n, p p c]
        return unpatchify(hidden_states, self.patch_size, height, width)


class PatchTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """A DiT from its patches to its blocks: what SD-DiT has in common with the methods beside it."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SDDiTBlock"]
    _repeated_blocks = ["SDDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    def _build_encoder(
        self, sample_size: int, patch_size: int, in_channels: int, num_layers: int, heads: int, head_dim: int,
        mlp_ratio: float, num_classes: int,
    ) -> int:  # fmt: skip
        """Makes embeddings and blocks; returns their width D.

        Raises:
            ValueError: as of `check_config`, or a size that the patches do not tile.
        """
        check_config(self.config)
        dim = heads * head_dim
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}.")
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = SinCosPositions(dim, sample_size // patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.transformer_blocks = nn.ModuleList(
            [SDDiTBlock(dim, heads, mlp_ratio, dim) for _ in range(num_layers)]
        )
        return dim

    def _initialize_weights(self) -> None:
        """DiT's initialisation: Xavier linears, small embeddings, and zeros where a residual branch ends."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for linear in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for _, token in self.named_parameters(recurse=False):  # of [CLS], of the mask
            nn.init.normal_(token, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, SDDiTBlock):
                nn.init.zeros_(module.modulation.weight)
            elif isinstance(module, AdaLayerNorm):
                nn.init.zeros_(module.linear.weight)
            elif name.split(".")[-1] == "proj_out":
                nn.init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in `ModelMixin`, with two differences.

        Pickles are read with `use_safetensors=False` only. Weights on a CPU are aligned: its kernels round
        otherwise at odd addresses.
        """
        if kwargs.get("use_safetensors") is None:  # what a pipeline passes on when it was told nothing
            kwargs["use_safetensors"] = True
        loaded = super().from_pretrained(*args, **kwargs)
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        *,
        config: str | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **download: Any,
    ) -> "PatchTransformer2DModel":
        """Loads one .safetensors file, whose metadata hold the model's config as JSON under "config".

        Args:
            pretrained_model_link_or_path_or_dict: the file, its link on the Hub, or its tensors by name.
            config: folder or Hub name of a config.json, in place of the file's own.
            subfolder: where that is in it.
            dtype: of the weights.
            device: where they go.
            download: for a link: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: it is no such file, has no config, or is of another class or size.
        """
        source: Any = pretrained_model_link_or_path_or_dict
        settings: dict[str, Any] = {}
        if isinstance(source, dict):
            weights, source = source, "A dict of tensors"
        else:
            weights, settings = read_single_file(source, **download)
        if config is not None:
            settings = cls.load_config(config, subfolder=subfolder)
        if not settings:
            raise ValueError(
                f"{source} has no config in its metadata; give config=, the folder of a config.json."
            )
        if settings.get("_class_name") != cls.__name__:
            raise ValueError(f"{source} is a {settings.get('_class_name')}, not a {cls.__name__}.")
        with torch.device("meta"):  # the weights are about to come
            model = cls.from_config(settings)
        if others := differing_names(model.state_dict(), weights):
            raise ValueError(f"{source} is not what its config says: they differ in {', '.join(others[:4])}.")
        model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        for module in model.modules():
            if isinstance(module, SinCosPositions):
                module.table = module._compute(module.base_size, module.base_size)
        align(model)
        return model.eval().to(device)

    def sees_part(self, layer: int) -> bool:
        """Whether a block, counted from 1, sees the visible patches alone where there is a mask."""
        return True

    def encode(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None
    ) -> Tensor:
        """Tokens of all patches after the last of `transformer_blocks`; nothing that follows them is run.

        Args:
            hidden_states, timestep, class_labels: as of `forward`.

        Returns:
            `[b, n, D]`, or `[b, 1 + n, D]` with [CLS] first.
        """
        tokens = self._with_cls(self._embed(hidden_states)[0])
        temb = self._condition(timestep, class_labels, hidden_states)
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, temb)
        return tokens

    def _with_cls(self, patches: Tensor) -> Tensor:
        """What the first block sees of patches `[b, k, D]`; a network with [CLS] puts it first."""
        return patches

    def _embed(self, hidden_states: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patches at their positions, `[b, n, D]`, and how many there are down and across.

        Raises:
            ValueError: wrong number of channels, or sides that are no multiples of the patch size.
        """
        channels, height, width = hidden_states.shape[1:]
        p = self.config.patch_size
        if channels != self.config.in_channels:
            raise ValueError(
                f"The input has {channels} channels; this model takes {self.config.in_channels}."
            )
        if height % p or width % p:
            raise ValueError(f"The input is {height} x {width}; both must be multiples of patch_size {p}.")
        grid = height // p, width // p
        patches = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        return patches + self.pos_embed(*grid).to(hidden_states.dtype), grid

    def _condition(
        self, timestep: Tensor | float, class_labels: Tensor | None, hidden_states: Tensor
    ) -> Tensor:
        """c = MLP(sinusoid(time)) + label embedding, `[b, D]`; time and sinusoid are always float32."""
        batch, device = hidden_states.shape[0], hidden_states.device
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(batch)
        timestep = self.config.timestep_scale * timestep + self.config.timestep_shift
        if class_labels is None:
            class_labels = torch.full((batch,), self.config.num_classes, device=device)
        sinusoid = self.time_proj(timestep).to(hidden_states.dtype)
        return self.time_embed(sinusoid) + self.label_embed(class_labels)


class SDDiTTransformer2DModel(PatchTransformer2DModel):
    """The SD-DiT student: encoder S and decoder G (Zhu et al., CVPR 2024, Sec. 3).

    Args:
        sample_size: height and width of the training samples (latents or pixels); others work too.
        patch_size: side p of a patch; the sample's sides must be multiples of it.
        in_channels: channels of the input.
        out_channels: channels of the output; None for `in_channels`.
        num_layers: blocks of the encoder.
        num_attention_heads, attention_head_dim: heads of the encoder; their product is its width D.
        mlp_ratio: hidden width of the MLPs over their width.
        num_decoder_layers: blocks of the decoder; 0 for an encoder alone, as the teacher is.
        decoder_num_attention_heads, decoder_attention_head_dim: the same for the decoder, of width E.
        num_classes: classes; the embedding has one row more for the null class, whose index is `num_classes`.
            0 for a model without classes.
        timestep_scale, timestep_shift: the time that is embedded is scale * timestep + shift. A flow's
            timestep is 1000 t; SiT embeds 1 - t (-0.001 and 1), REPA t (0.001 and 0).

    Raises:
        ValueError: a number out of its range, a width that sine-cosine positions cannot have, or a size that
            the patches do not tile.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_decoder_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_attention_head_dim: int = 32,
        num_classes: int = 1000,
        timestep_scale: float = 1.0,
        timestep_shift: float = 0.0,
    ):
        super().__init__()
        dim = self._build_encoder(
            sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
            mlp_ratio, num_classes,
        )  # fmt: skip
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder = None
        if num_decoder_layers > 0:
            self.decoder = SDDiTDecoder(
                dim, num_decoder_layers, decoder_num_attention_heads, decoder_attention_head_dim, mlp_ratio,
                sample_size // patch_size, patch_size, out_channels or in_channels,
            )  # fmt: skip
        self._initialize_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        visible_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> SDDiTTransformer2DOutput | tuple:
        """Runs the student.

        Args:
            hidden_states: the sample scaled by c_in, `[b, in_channels, h, w]`.
            timestep: what the scheduler gives, c_noise = ln(sigma) / 4 of EDM and 1000 t of a flow; one for
                all or one each, `[b]`; kept in float32.
            class_labels: integers `[b]` in 0..num_classes, where num_classes is the null class; None: all
                null.
            visible_ids: indices of the patches that the encoder sees, `[b, k]`, without repeats; None: all.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: wrong number of channels, or sides that are no multiples of the patch size.
        """
        patches, (height, width) = self._embed(hidden_states)  # [b, n, D]
        temb = self._condition(timestep, class_labels, hidden_states)  # [b, D]

        # The encoder sees [CLS] and the visible patches only.
        visible = patches if visible_ids is None else gather_tokens(patches, visible_ids)  # [b, k, D]
        tokens = self._with_cls(visible)
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, temb)  # [b, 1 + k, D]

        sample = None
        if self.decoder is not None:
            # The complete token set H: encoded where visible, the bare patch embeddings where masked (Sec.
            # 3.3).
            cls, complete = tokens[:, 0], tokens[:, 1:]
            if visible_ids is not None:
                complete = scatter_tokens(patches, complete, visible_ids)  # [b, n, D]
            sample = self.decoder(complete, cls, temb, height, width)  # [b, c, h, w]

        if not return_dict:
            return (sample, tokens)
        return SDDiTTransformer2DOutput(sample=sample, encoder_hidden_states=tokens)

    def _with_cls(self, patches: Tensor) -> Tensor:
        cls = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1)  # [b, 1 + k, D]


def check_config(config: dict) -> None:
    """Raises a ValueError for numbers that no network can be built of."""
    counts = {
        "sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads",
        "attention_head_dim", "decoder_num_attention_heads", "decoder_attention_head_dim",
    }  # fmt: skip
    for name, value in config.items():
        if name in counts and not (name == "out_channels" and value is None):
            check_number(name, value, low=1, kind=Integral)
        elif name in ("num_decoder_layers", "num_classes"):
            check_number(name, value, low=0, kind=Integral)
    check_number("mlp_ratio", config["mlp_ratio"], above=0)
    for name in ("timestep_scale", "timestep_shift"):
        check_number(name, config[name])
    for name, prefix in (("encoder", ""), ("decoder", "decoder_")):
        if prefix + "num_attention_heads" in config:
            width = config[prefix + "num_attention_heads"] * config[prefix + "attention_head_dim"]
            if width % 4:
                raise ValueError(
                    f"The {name}'s width (heads x head dim) is {width}; it must be a multiple of 4."
                )
            if width * config["mlp_ratio"] < 1:
                raise ValueError(
                    f"mlp_ratio is {config['mlp_ratio']}; it must be at least 1 / {width} (the {name})."
                )


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf,
    kind: type = Real,
) -> None:  # fmt: skip
    """Raises a ValueError for what is no finite number of the range; `kind` Integral asks for a whole one."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if is_number and -math.inf < value < math.inf and low <= value <= high and value > above:
        return
    limits = {"above": above, "at least": low, "at most": high}
    told = " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))
    what = "a whole number" if kind is Integral else "a finite number"
    raise ValueError(f"{name} is {value!r:.80}; it must be {what}{', ' * bool(told)}{told}.")


def read_single_file(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a .safetensors file, or of a link to one, and the config of its metadata, {} without.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = path
    if "://" in str(path):
        try:
            from diffusers.loaders.single_file_utils import _extract_repo_id_and_weights_name
            from diffusers.utils.hub_utils import _get_model_file
        except ImportError:
            raise ValueError(
                f"This version of diffusers cannot load the link {path}; download the file and give its path."
            ) from None
        repo, name = _extract_repo_id_and_weights_name(str(path))
        file = _get_model_file(
            repo, weights_name=name, revision=revision, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only,
        )  # fmt: skip
    elif not os.path.isfile(path):
        raise ValueError(f"There is no file {path}.")
    try:
        with safe_open(file, framework="pt") as tensors:
            settings = json.loads((tensors.metadata() or {}).get("config", "{}"))
            if not isinstance(settings, dict):
                raise ValueError(f"its config is {settings!r}")
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, settings
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. Pickles are not loaded; "
            "python -m sddit_diffusers.convert makes single files of them."
        ) from None


def differing_names(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names that only one of two state dicts has, then those whose shapes differ."""
    others = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    return sorted(ours.keys() ^ theirs.keys()) + others


def align(model: nn.Module) -> None:
    """Copies the weights that lie at odd addresses of a CPU's memory."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def gather_tokens(tokens: Tensor, visible_ids: Tensor) -> Tensor:
    """The visible ones, `[b, n, D]` and their places `[b, k]` to `[b, k, D]`."""
    return tokens.gather(1, visible_ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: Tensor, visible: Tensor, visible_ids: Tensor) -> Tensor:
    """Tokens `[b, n, D]` with the visible ones `[b, k, D]` at their places `[b, k]`."""
    index = visible_ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, index, visible.to(tokens.dtype))


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """`[b, n, p p c]` of a grid of patches to `[b, c, h, w]`."""
    patches = patches.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, (height, width))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # from [b, h/p, w/p, p, p, c]


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: `[b, tokens, dim]` with shift and scale `[b, 1, dim]`."""
    return hidden_states * (1 + scale) + shift


def run_block(parent: nn.Module, block: SDDiTBlock, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Runs a block, recomputing it in the backward pass where `parent` has gradient checkpointing on."""
    if torch.is_grad_enabled() and parent.gradient_checkpointing:
        return parent._gradient_checkpointing_func(block, hidden_states, temb)
    return block(hidden_states, temb)
