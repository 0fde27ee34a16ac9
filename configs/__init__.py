"""YAML configs that come with vislr: `--config train/emoji-unet-convlora.yaml` finds them from anywhere."""
