"""What the papers do with the bilinear tensor: pure functions over the package's ops."""

__all__: list[str] = []
