"""The networks of the default sweep: of each timm family one, all of torchvision, some of transformers."""

from __future__ import annotations

#: The smallest, by parameters, of each family: of names with one stem (`repvgg`, `resnetv2`) and of each timm module.
TIMM = """
    aimv2_large_patch14_224 bat_resnext26ts beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 caformer_s18
    cait_xxs24_224 coat_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32
    convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspdarknet53
    cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny deepseek_vit_412m deit_tiny_patch16_224
    densenet121 densenetblur121d dla102x2 dla46x_c dm_nfnet_f0 dpn48b eca_resnext26ts ecaresnet26t ecaresnetlight
    ecaresnext26t_32x4d edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0
    efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224
    fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b flexivit_small focalnet_tiny_srf gc_efficientnetv2_rw_t
    gcresnet33ts gcresnext26ts gcvit_xxtiny gemma4_vit_167m gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050
    gmixer_12_224 gmlp_ti16_224 halo2botnet50ts_256 halonet_h1 haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0
    hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
    inception_v4 lambda_resnet26t lamhalobotnet50ts_256 lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception
    levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256
    mixer_s16_224 mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
    mobilenetv4_conv_small_035 mobilenetv5_base mobileone_s1 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nfnet_l0 pit_ti_224
    pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002
    regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m1 res2net50_14w_8s res2next50 resmlp_12_224 resnest14d
    resnet10t resnet50x4_clip_gap resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts rexnet_100 rexnetr_100
    sam2_hiera_tiny samvit_base_patch16_224 sebotnet33ts_256 sedarknet21 sehalonet33ts selecsls42 semnasnet_050
    senet154 sequencer2d_s seresnet18 seresnetaa50d seresnext26ts seresnextaa101d_32x8d shvit_s1 skresnet18
    skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window16_256 test_convnext test_vit_relpos tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_dinov3_qkvb
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41p xcit_nano_12_p8_224
"""
#: Built from their configuration alone, with no weights.
TRANSFORMERS = "ConvNext Levit MobileNetV2 RegNet ResNet"


def default_names() -> list[str]:
    from torchvision.models import list_models  # type: ignore[import-untyped]

    return [
        *(f"torchvision:{name}" for name in list_models()),
        *(f"timm:{name}" for name in TIMM.split()),
        *(f"transformers:{name}" for name in TRANSFORMERS.split()),
    ]
