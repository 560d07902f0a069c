"""Networks: nn.Modules only, one file a paper; chosen by `_target_` in conf/model."""
