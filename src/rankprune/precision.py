"""What PyTorch multiplies float32 matrices in."""

import torch


def float32_products() -> str:
    """The text "highest" where they are of float32; otherwise one that differs between the settings that narrow them."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # raised where torch's newer settings narrow them
        backends = torch.backends
        chosen = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul, backends.cudnn.conv)  # type: ignore
        return str([each.fp32_precision for each in chosen])
