"""The shape of a DiT-MoE, and what it refuses."""

from dataclasses import dataclass, field

from flows.errors import UserError
from flows.models.adaln import TimeKind
from flows.models.choice import Balance, Chooser, Gate, Routing
from flows.models.feedforward import RATIO, FeedForwardKind
from flows.models.grouped import ALIGNMENT
from flows.models.refusals import check_heads, check_patches, check_position_table

SHARED_RATIO = 2


@dataclass(frozen=True)
class DiTMoEConfig:
    """Everything that decides the network's shape and its routing; see `flows.models.choice.Routing`.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    patch: side of a patch in pixels
    learn_sigma: the last layer gives two outputs a channel, as published; the second is unused
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    experts: int
    chosen: int = field(default=2, metadata={"description": "experts that a token goes to"})
    learn_sigma: bool = False
    expert: FeedForwardKind = field(
        default="swiglu",
        metadata={"description": "swiglu, without biases; gelu: as the feed-forward of a DiT"},
    )
    expert_hidden: int = field(
        default=0, metadata={"description": "width within an expert; 0: 4 width", "minimum": 0}
    )
    shared_hidden: int = field(
        default=-1,
        metadata={
            "description": "width within the network of all tokens; -1: 2 width, 0: there is none",
            "minimum": -1,
        },
    )
    chooser: Chooser = field(
        default="tokens",
        metadata={"description": "who chooses: tokens their experts, or experts their tokens"},
    )
    gate: Gate = "softmax"
    renormalise: bool = field(
        default=False, metadata={"description": "the weights of a token's experts sum to one"}
    )
    gate_scale: float = field(default=1.0, metadata={"description": "times those weights"})
    capacity: float = field(
        default=0.0,
        metadata={
            "description": "places of an expert in a sample, over its equal share; what is too much is "
            "dropped; 0: nothing is"
        },
    )
    balance: Balance = field(
        default="previous",
        metadata={
            "description": "balance loss by the loads of the previous step's batch, or of each sample "
            "(sequence)"
        },
    )
    balance_weight: float = field(default=0.01, metadata={"description": "of the balance loss"})
    z_weight: float = field(
        default=0.0, metadata={"description": "of the loss of large logits (0.001 as published)"}
    )
    bias_rate: float = field(
        default=0.0,
        metadata={"description": "a step's change of biases that balance choices; 0: none (0.001)"},
    )
    recurrent: int = field(
        default=0,
        metadata={"description": "width of the routers' recurrent state; 0: none", "minimum": 0},
    )
    mask_outputs: float = field(
        default=0.0,
        metadata={"description": "share of the experts' outputs masked in training (0.2 in NLLB)"},
    )
    time: TimeKind = field(
        default="flow",
        metadata={"description": "what the network is told: flow (t), reversed (1 - t), steps"},
    )

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        check_heads(self.width, self.heads)
        check_position_table(self.width)
        _check_routing(self)
        for key, value in (
            ("width", self.width),
            ("expert_hidden", self.hidden),
        ):
            if value % ALIGNMENT:
                raise UserError(
                    f"model.{key} = {value} is not a multiple of {ALIGNMENT}, as the products of grouped "
                    f"experts need; use {-(-value // ALIGNMENT) * ALIGNMENT}."
                )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def outputs(self) -> int:
        """Channels of the last layer, the unused ones included."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def hidden(self) -> int:
        """Width within an expert."""
        return self.expert_hidden or RATIO * self.width

    @property
    def shared(self) -> int:
        """Width within the shared network, 0 where there is none."""
        return SHARED_RATIO * self.width if self.shared_hidden < 0 else self.shared_hidden

    @property
    def slots(self) -> int:
        """Numbers of a mask of one token in one layer."""
        return self.chosen if self.chooser == "tokens" else self.experts

    @property
    def routing(self) -> Routing:
        return Routing(
            self.experts,
            self.chosen,
            self.chooser,
            self.gate,
            self.renormalise,
            self.gate_scale,
            self.capacity,
            self.balance if self.chooser == "tokens" else "none",
            self.balance_weight,
            self.z_weight,
            self.bias_rate,
            self.recurrent,
        )


def _check_routing(config: DiTMoEConfig) -> None:
    if config.chosen > config.experts:
        raise UserError(
            f"model.chosen = {config.chosen} is more than model.experts = {config.experts}; a token goes to "
            f"at most {config.experts}."
        )
    if not 0.0 <= config.mask_outputs < 1.0:
        raise UserError(
            f"model.mask_outputs = {config.mask_outputs:g} is no share below 1; use 0.2, or 0 for none."
        )
    for key in ("capacity", "balance_weight", "z_weight", "bias_rate"):
        if getattr(config, key) < 0:
            raise UserError(f"model.{key} = {getattr(config, key):g} is below 0; use 0 for none.")
    if config.capacity * config.chosen > config.experts:
        most = config.experts / config.chosen
        instead = "0 for that" if config.chooser == "tokens" else "no more"
        raise UserError(
            f"model.capacity = {config.capacity:g} is above model.experts / model.chosen = {most:g}, with "
            f"which every expert has a place for every token; use {instead}."
        )
    if config.gate_scale <= 0:
        raise UserError(f"model.gate_scale = {config.gate_scale:g} is not above 0; use 1 for none.")
    if config.chooser == "experts" and config.bias_rate:
        raise UserError(
            f"model.bias_rate = {config.bias_rate:g} balances what tokens choose, and with "
            "model.chooser = experts every expert has as many; set model.bias_rate=0."
        )
