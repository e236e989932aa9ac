"""The timm suite: a small model of every family that timm users train."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from setpoint.report.target import noise
from setpoint_bench.coverage import Build
from setpoint_bench.zoo import timm_model

_NAMES = """
    resnet18 resnet26d resnet26t resnetv2_50 resnet50_gn resnetaa50 resnetblur50 resnetrs50 seresnet50
    seresnext26d_32x4d ecaresnet26t resnext26ts resnext50_32x4d wide_resnet50_2 skresnet18 skresnext50_32x4d resnest14d
    res2net50_26w_4s res2next50 regnetx_002 regnety_002 regnetv_040 regnetz_b16 gcresnet33ts
    efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnet_es gc_efficientnetv2_rw_t mobilenetv1_100
    mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    mnasnet_100 semnasnet_100 fbnetc_100 fbnetv3_b hardcorenas_a spnasnet_100 mixnet_s lcnet_050 tinynet_e ghostnet_100
    ghostnetv2_100 rexnet_100 mobileone_s0 repvgg_a0 repvit_m0_9 fastvit_t8 repghostnet_050
    convnext_atto convnextv2_atto convnext_pico_ols dm_nfnet_f0 nf_resnet50 nf_regnet_b0 eca_nfnet_l0
    vgg11 vgg11_bn densenet121 dla34 dla60_res2net dpn68 hrnet_w18_small cspresnet50 cspdarknet53 darknet53
    inception_v3 inception_v4 inception_resnet_v2 xception41 vovnet39a ese_vovnet19b_dw selecsls42 hgnet_tiny hgnetv2_b0
    bat_resnext26ts botnet26t_256 halonet26t lambda_resnet26t lamhalobotnet50ts_256 sebotnet33ts_256
    vit_tiny_patch16_224 vit_small_patch32_224 vit_base_patch32_plus_256 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
    deit3_small_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
    xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224
    maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 coatnet_nano_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224
    levit_128s pit_ti_224 tnt_s_legacy_patch16_224 twins_pcpvt_small twins_svt_small pvt_v2_b0 mvitv2_tiny
    mixer_s32_224 gmixer_24_224 resmlp_12_224 gmlp_ti16_224 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
    volo_d1_224 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 edgenext_xx_small
    mobilevit_xxs mobilevitv2_050 visformer_tiny crossvit_9_240 convit_tiny coat_lite_tiny nest_tiny sequencer2d_s
    davit_tiny focalnet_tiny_srf gcvit_xxtiny inception_next_atto convmixer_768_32 tiny_vit_5m_224 nextvit_small
    hiera_tiny_224 shvit_s1 starnet_s1 swiftformer_xs tresnet_m rdnet_tiny samvit_base_patch16_224
""".split()  # noqa: SIM905


def suite() -> Mapping[str, Build]:
    return {name: partial(_build, name) for name in _NAMES}


def _build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The untrained model and two images of the size that it is made for (smaller where any size will do)."""
    model, example = timm_model(name)
    about: Any = model.pretrained_cfg
    if not about.get("fixed_input_size", False) and not _any_attention(model):
        example = (noise((2, 3, 96, 96)),)
    return model, example


def _any_attention(model: nn.Module) -> bool:
    """Whether some module may be built for one size of image; those without attention seldom are."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    return any("att" in kind or "mix" in kind for kind in kinds)
