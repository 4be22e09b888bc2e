"""Residual networks for small images.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition"
(2016); with a first layer for images of 32 x 32 pixels.
"""

import keras

# Name to the width of each stage, and the number of blocks in each.
MODELS = {"resnet8": ((16, 32, 64), 1), "resnet18": ((64, 128, 256, 512), 2)}
NORMS = ("group", "batch")


def build_resnet(name, norm, num_classes=10, image_size=32):
    """A residual network that returns logits.

    Args:
        name: One of `MODELS`: "resnet18" has 11.2 million weights, "resnet8"
            78 thousand, few enough for a CPU.
        norm: "batch", or "group": groups of up to 16 channels of each image
            alone, so that nothing depends on the other images of a worker.
        num_classes: Number of logits.
        image_size: Height and width of the images, which have 3 channels.

    Returns:
        A `keras.Model`.
    """
    widths, num_blocks = MODELS[name]
    images = keras.Input((image_size, image_size, 3))
    x = _conv(widths[0], 3, 1)(images)
    x = keras.layers.ReLU()(_normalise(norm)(x))
    for stage, width in enumerate(widths):
        for block in range(num_blocks):
            x = _block(x, width, 2 if stage and not block else 1, norm)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(num_classes)(x), name=name)


def _block(x, width, stride, norm):
    """Two convolutions and a shortcut."""
    y = _conv(width, 3, stride)(x)
    y = keras.layers.ReLU()(_normalise(norm)(y))
    y = _normalise(norm)(_conv(width, 3, 1)(y))
    if stride > 1:
        x = _normalise(norm)(_conv(width, 1, stride)(x))
    return keras.layers.ReLU()(keras.layers.Add()([x, y]))


def _conv(width, size, stride):
    return keras.layers.Conv2D(
        width,
        size,
        stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )


def _normalise(norm):
    if norm == "batch":
        return keras.layers.BatchNormalization(momentum=0.9)
    return lambda x: keras.layers.GroupNormalization(max(1, x.shape[-1] // 16))(
        x
    )
