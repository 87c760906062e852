// SPDX-License-Identifier: MIT

#include "layers.h"

#include <torch/torch.h>

#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

namespace memcnn_test {
namespace {

using namespace torch::nn;
using torch::Tensor;

constexpr int64_t kChannels = 0; // in sizes

const ArgumentKind kFeatures{{3, kChannels}, /*batch_dim=*/0};
const ArgumentKind kSeries{{3, kChannels, 7}, /*batch_dim=*/0};
const ArgumentKind kImage{{3, kChannels, 6, 5}, /*batch_dim=*/0};
const ArgumentKind kVolume{{3, kChannels, 4, 3, 5}, /*batch_dim=*/0};
/// What recurrent layers and attention take: the batch second.
const ArgumentKind kTokens{{5, 3, kChannels}, /*batch_dim=*/1};

/// Layers one after the other, as one module with a plain forward.
struct ChainedImpl : Module {
  template <class... Layers>
  explicit ChainedImpl(Layers... parts)
      : layers(register_module("layers", Sequential(std::move(parts)...))) {}
  Tensor forward(const Tensor& x) {
    return layers->forward(x);
  }
  Sequential layers;
};

template <class... Layers>
AnyModule chained(Layers... parts) {
  return AnyModule(std::make_shared<ChainedImpl>(std::move(parts)...));
}

/// A layer between other types than a Tensor and a Tensor: `call` says how it
/// is called.
template <class M>
struct AdaptedImpl : Module {
  using Call = std::function<Tensor(M&, const Tensor&)>;
  AdaptedImpl(M layer_, Call call_)
      : layer(register_module("layer", std::move(layer_))),
        call(std::move(call_)) {}
  Tensor forward(const Tensor& x) {
    return call(layer, x);
  }
  M layer;
  Call call;
};

template <class M>
AnyModule adapted(M layer, typename AdaptedImpl<M>::Call call) {
  return AnyModule(
      std::make_shared<AdaptedImpl<M>>(std::move(layer), std::move(call)));
}

/// Of a recurrent layer the first result, without its state.
template <class M>
AnyModule first_of(M layer) {
  return adapted(std::move(layer), [](M& it, const Tensor& x) {
    return std::get<0>(it->forward(x));
  });
}

/// A list of layers of one kind of argument.
class Family {
 public:
  explicit Family(ArgumentKind argument) : argument_(std::move(argument)) {}

  template <class Make>
  Family& add(const char* name, Make make) {
    return push(name, /*any_channels=*/true, make);
  }
  template <class Make>
  Family& add_even(const char* name, Make make) {
    return push(name, /*any_channels=*/false, make);
  }

  const std::vector<Layer>& layers() const {
    return layers_;
  }

 private:
  template <class Make>
  Family& push(const char* name, bool any_channels, Make make) {
    layers_.push_back({name, argument_, any_channels, [make](int64_t channels) {
                         return AnyModule(make(channels));
                       }});
    return *this;
  }

  ArgumentKind argument_;
  std::vector<Layer> layers_;
};

Family convolutions_of_images() {
  return Family(kImage)
      .add(
          "Conv2d",
          [](int64_t c) { return Conv2d(Conv2dOptions(c, c, 3).padding(1)); })
      .add(
          "Conv2dReflecting",
          [](int64_t c) {
            return Conv2d(Conv2dOptions(c, c, 3).padding(1).padding_mode(
                torch::kReflect));
          })
      .add(
          "Conv2dOfOne",
          [](int64_t c) { return Conv2d(Conv2dOptions(c, c, 1).bias(false)); })
      .add(
          "Conv2dDilated",
          [](int64_t c) {
            return Conv2d(Conv2dOptions(c, c, 3).padding(2).dilation(2));
          })
      .add(
          "Conv2dDepthwise",
          [](int64_t c) {
            return Conv2d(Conv2dOptions(c, c, 3).padding(1).groups(c));
          })
      .add_even(
          "Conv2dGrouped",
          [](int64_t c) {
            return Conv2d(Conv2dOptions(c, c, 3).padding(1).groups(2));
          })
      .add(
          "ConvTranspose2d",
          [](int64_t c) {
            return ConvTranspose2d(ConvTranspose2dOptions(c, c, 3).padding(1));
          })
      .add_even(
          "ConvTranspose2dGrouped",
          [](int64_t c) {
            return ConvTranspose2d(
                ConvTranspose2dOptions(c, c, 3).padding(1).groups(2));
          })
      .add("Conv2dStridedAndBack", [](int64_t c) {
        return chained(
            Conv2d(Conv2dOptions(c, 2 * c, 2).stride({2, 1})),
            ConvTranspose2d(
                ConvTranspose2dOptions(2 * c, c, 2).stride({2, 1})));
      });
}

Family convolutions_of_series() {
  return Family(kSeries)
      .add(
          "Conv1d",
          [](int64_t c) { return Conv1d(Conv1dOptions(c, c, 3).padding(1)); })
      .add(
          "Conv1dDilated",
          [](int64_t c) {
            return Conv1d(Conv1dOptions(c, c, 3).padding(2).dilation(2));
          })
      .add_even(
          "Conv1dGrouped",
          [](int64_t c) {
            return Conv1d(Conv1dOptions(c, c, 3).padding(1).groups(2));
          })
      .add("ConvTranspose1d", [](int64_t c) {
        return ConvTranspose1d(ConvTranspose1dOptions(c, c, 3).padding(1));
      });
}

Family convolutions_of_volumes() {
  return Family(kVolume)
      .add(
          "Conv3d",
          [](int64_t c) { return Conv3d(Conv3dOptions(c, c, 3).padding(1)); })
      .add_even(
          "Conv3dGrouped",
          [](int64_t c) {
            return Conv3d(Conv3dOptions(c, c, 3).padding(1).groups(2));
          })
      .add("ConvTranspose3d", [](int64_t c) {
        return ConvTranspose3d(ConvTranspose3dOptions(c, c, 3).padding(1));
      });
}

Family norms_of_images() {
  return Family(kImage)
      .add("BatchNorm2d", [](int64_t c) { return BatchNorm2d(c); })
      .add(
          "BatchNorm2dCumulative",
          [](int64_t c) {
            return BatchNorm2d(BatchNorm2dOptions(c).momentum(torch::nullopt));
          })
      .add(
          "BatchNorm2dWithoutStatistics",
          [](int64_t c) {
            return BatchNorm2d(
                BatchNorm2dOptions(c).track_running_stats(false).affine(false));
          })
      .add("InstanceNorm2d", [](int64_t c) { return InstanceNorm2d(c); })
      .add(
          "InstanceNorm2dTracking",
          [](int64_t c) {
            return InstanceNorm2d(
                InstanceNorm2dOptions(c).track_running_stats(true).affine(
                    true));
          })
      .add(
          "GroupNorm",
          [](int64_t c) { return GroupNorm(GroupNormOptions(1, c)); })
      .add_even(
          "GroupNormOfTwo",
          [](int64_t c) { return GroupNorm(GroupNormOptions(2, c)); })
      .add(
          "LayerNorm",
          [](int64_t) {
            return LayerNorm(LayerNormOptions({6, 5}));
          })
      .add(
          "LocalResponseNorm",
          [](int64_t) {
            return LocalResponseNorm(LocalResponseNormOptions(2));
          })
      .add("CrossMapLRN2d", [](int64_t) {
        return CrossMapLRN2d(CrossMapLRN2dOptions(3));
      });
}

Family norms_of_series() {
  return Family(kSeries)
      .add("BatchNorm1d", [](int64_t c) { return BatchNorm1d(c); })
      .add("InstanceNorm1d", [](int64_t c) { return InstanceNorm1d(c); })
      .add("InstanceNorm1dTracking", [](int64_t c) {
        return InstanceNorm1d(
            InstanceNorm1dOptions(c).track_running_stats(true).affine(true));
      });
}

Family norms_of_volumes() {
  return Family(kVolume)
      .add("BatchNorm3d", [](int64_t c) { return BatchNorm3d(c); })
      .add("InstanceNorm3d", [](int64_t c) { return InstanceNorm3d(c); })
      .add("InstanceNorm3dTracking", [](int64_t c) {
        return InstanceNorm3d(
            InstanceNorm3dOptions(c).track_running_stats(true).affine(true));
      });
}

Family recurrent() {
  return Family(kTokens)
      .add("RNN", [](int64_t c) { return first_of(RNN(RNNOptions(c, c))); })
      .add("LSTM", [](int64_t c) { return first_of(LSTM(LSTMOptions(c, c))); })
      .add("GRU", [](int64_t c) { return first_of(GRU(GRUOptions(c, c))); })
      .add(
          "RNNDeep",
          [](int64_t c) {
            return first_of(RNN(RNNOptions(c, c)
                                    .num_layers(2)
                                    .nonlinearity(torch::kReLU)
                                    .dropout(0.5)));
          })
      .add_even(
          "LSTMBothWays",
          [](int64_t c) {
            return first_of(LSTM(LSTMOptions(c, c / 2).bidirectional(true)));
          })
      .add(
          "LSTMDeep",
          [](int64_t c) {
            return first_of(LSTM(LSTMOptions(c, c).num_layers(2).dropout(0.5)));
          })
      .add(
          "LSTMProjected",
          [](int64_t c) {
            return first_of(LSTM(LSTMOptions(c, c + 2).proj_size(c)));
          })
      .add(
          "LSTMBatchFirst",
          [](int64_t c) {
            return first_of(LSTM(LSTMOptions(c, c).batch_first(true)));
          })
      .add("GRUDeep", [](int64_t c) {
        return first_of(GRU(GRUOptions(c, c).num_layers(2).dropout(0.5)));
      });
}

Family attention() {
  const auto encoder = [](int64_t c) {
    return TransformerEncoderLayerOptions(c, 2).dim_feedforward(8).dropout(0.1);
  };
  const auto decoder = [](int64_t c) {
    return TransformerDecoderLayerOptions(c, 2).dim_feedforward(8).dropout(0.1);
  };
  const auto of_itself = [](auto& layer, const Tensor& x) {
    return layer->forward(x, x);
  };
  return Family(kTokens)
      .add_even(
          "MultiheadAttention",
          [](int64_t c) {
            return adapted(
                MultiheadAttention(
                    MultiheadAttentionOptions(c, 2).dropout(0.2)),
                [](auto& layer, const Tensor& x) {
                  return std::get<0>(layer->forward(x, x, x));
                });
          })
      .add_even(
          "TransformerEncoderLayer",
          [=](int64_t c) { return TransformerEncoderLayer(encoder(c)); })
      .add_even(
          "TransformerEncoder",
          [=](int64_t c) {
            return TransformerEncoder(TransformerEncoderOptions(encoder(c), 2));
          })
      .add_even(
          "TransformerDecoderLayer",
          [=](int64_t c) {
            return adapted(TransformerDecoderLayer(decoder(c)), of_itself);
          })
      .add_even(
          "TransformerDecoder",
          [=](int64_t c) {
            return adapted(
                TransformerDecoder(TransformerDecoderOptions(decoder(c), 2)),
                of_itself);
          })
      .add_even("Transformer", [=](int64_t c) {
        return adapted(
            Transformer(TransformerOptions(c, 2, 1, 1).dim_feedforward(8)),
            of_itself);
      });
}

Family dropouts_of_images() {
  return Family(kImage)
      .add("Dropout", [](int64_t) { return Dropout(0.5); })
      .add("Dropout2d", [](int64_t) { return Dropout2d(0.5); })
      .add("AlphaDropout", [](int64_t) { return AlphaDropout(0.5); })
      .add(
          "FeatureAlphaDropout",
          [](int64_t) { return FeatureAlphaDropout(0.5); })
      .add("RReLU", [](int64_t) { return RReLU(); })
      .add("FractionalMaxPool2d", [](int64_t c) {
        return chained(
            ReflectionPad2d(1),
            FractionalMaxPool2d(FractionalMaxPool2dOptions(2).output_size(
                torch::ExpandingArray<2>({6, 5}))),
            Conv2d(Conv2dOptions(c, c, 1)));
      });
}

Family dropouts_of_volumes() {
  return Family(kVolume).add(
      "Dropout3d", [](int64_t) { return Dropout3d(0.5); });
}

Family activations() {
  return Family(kImage)
      .add("ELU", [](int64_t) { return ELU(); })
      .add("SELU", [](int64_t) { return SELU(); })
      .add("CELU", [](int64_t) { return CELU(); })
      .add("Hardshrink", [](int64_t) { return Hardshrink(); })
      .add("Hardtanh", [](int64_t) { return Hardtanh(); })
      .add("LeakyReLU", [](int64_t) { return LeakyReLU(); })
      .add("LogSigmoid", [](int64_t) { return LogSigmoid(); })
      .add("Softmax", [](int64_t) { return Softmax(1); })
      .add("Softmin", [](int64_t) { return Softmin(-1); })
      .add("LogSoftmax", [](int64_t) { return LogSoftmax(1); })
      .add("Softmax2d", [](int64_t) { return Softmax2d(); })
      .add("PReLU", [](int64_t) { return PReLU(); })
      .add(
          "PReLUOfChannels",
          [](int64_t c) { return PReLU(PReLUOptions().num_parameters(c)); })
      .add("ReLU", [](int64_t) { return ReLU(); })
      .add("ReLU6", [](int64_t) { return ReLU6(); })
      .add(
          "GLU",
          [](int64_t c) {
            return chained(Conv2d(Conv2dOptions(c, 2 * c, 1)), GLU(1));
          })
      .add("GELU", [](int64_t) { return GELU(); })
      .add("SiLU", [](int64_t) { return SiLU(); })
      .add("Mish", [](int64_t) { return Mish(); })
      .add("Sigmoid", [](int64_t) { return Sigmoid(); })
      .add("Softplus", [](int64_t) { return Softplus(); })
      .add("Softshrink", [](int64_t) { return Softshrink(); })
      .add("Softsign", [](int64_t) { return Softsign(); })
      .add("Tanh", [](int64_t) { return Tanh(); })
      .add("Tanhshrink", [](int64_t) { return Tanhshrink(); })
      .add("Threshold", [](int64_t) { return Threshold(0.1, 0.2); });
}

Family pooling_of_images() {
  return Family(kImage)
      .add(
          "AvgPool2d",
          [](int64_t) {
            return AvgPool2d(AvgPool2dOptions(3).stride(1).padding(1));
          })
      .add(
          "MaxPool2d",
          [](int64_t) {
            return MaxPool2d(MaxPool2dOptions(3).stride(1).padding(1));
          })
      .add(
          "LPPool2d",
          [](int64_t) {
            return chained(
                ReplicationPad2d(1),
                LPPool2d(LPPool2dOptions(2, 3).stride(1)),
                Softsign());
          })
      .add(
          "AdaptiveAvgPool2d",
          [](int64_t) {
            return chained(
                ZeroPad2d(1),
                AdaptiveAvgPool2d(AdaptiveAvgPool2dOptions({6, 5})));
          })
      .add(
          "AdaptiveMaxPool2d",
          [](int64_t) {
            return chained(
                ConstantPad2d(ConstantPad2dOptions(1, -1)),
                AdaptiveMaxPool2d(AdaptiveMaxPool2dOptions({6, 5})));
          })
      .add("MaxUnpool2d", [](int64_t) {
        return adapted(
            MaxPool2d(MaxPool2dOptions({2, 1})),
            [](MaxPool2d& pool, const Tensor& x) {
              const auto [values, indices] = pool->forward_with_indices(x);
              return MaxUnpool2d(MaxUnpool2dOptions({2, 1}))(values, indices);
            });
      });
}

Family pooling_of_series() {
  return Family(kSeries)
      .add(
          "AvgPool1d",
          [](int64_t) {
            return AvgPool1d(AvgPool1dOptions(3).stride(1).padding(1));
          })
      .add(
          "MaxPool1d",
          [](int64_t) {
            return MaxPool1d(MaxPool1dOptions(3).stride(1).padding(1));
          })
      .add(
          "LPPool1d",
          [](int64_t) {
            return chained(
                ReflectionPad1d(1),
                LPPool1d(LPPool1dOptions(2, 3).stride(1)),
                Softsign());
          })
      .add(
          "AdaptiveAvgPool1d",
          [](int64_t) {
            return chained(
                ReplicationPad1d(1),
                AdaptiveAvgPool1d(AdaptiveAvgPool1dOptions(7)));
          })
      .add("AdaptiveMaxPool1d", [](int64_t) {
        return chained(
            ZeroPad1d(1), AdaptiveMaxPool1d(AdaptiveMaxPool1dOptions(7)));
      });
}

Family pooling_of_volumes() {
  return Family(kVolume)
      .add(
          "AvgPool3d",
          [](int64_t) {
            return AvgPool3d(AvgPool3dOptions(3).stride(1).padding(1));
          })
      .add(
          "MaxPool3d",
          [](int64_t) {
            return MaxPool3d(MaxPool3dOptions(3).stride(1).padding(1));
          })
      .add(
          "LPPool3d",
          [](int64_t) {
            return chained(
                ReplicationPad3d(1),
                LPPool3d(LPPool3dOptions(2, 3).stride(1)),
                Softsign());
          })
      .add(
          "AdaptiveAvgPool3d",
          [](int64_t) {
            return chained(
                ReflectionPad3d(1),
                AdaptiveAvgPool3d(AdaptiveAvgPool3dOptions({4, 3, 5})));
          })
      .add(
          "AdaptiveMaxPool3d",
          [](int64_t) {
            return chained(
                ZeroPad3d(1),
                AdaptiveMaxPool3d(AdaptiveMaxPool3dOptions({4, 3, 5})));
          })
      .add("FractionalMaxPool3d", [](int64_t) {
        return chained(
            ConstantPad3d(ConstantPad3dOptions(1, 0.5)),
            FractionalMaxPool3d(FractionalMaxPool3dOptions(2).output_size(
                torch::ExpandingArray<3>({4, 3, 5}))));
      });
}

Family resampling() {
  const auto resized = [](auto mode) {
    return [mode](int64_t) {
      auto options =
          UpsampleOptions().scale_factor(std::vector<double>{2, 2}).mode(mode);
      if constexpr (!std::
                        is_same_v<decltype(mode), torch::enumtype::kNearest>) {
        options.align_corners(false); // said, or LibTorch warns
      }
      return chained(Upsample(options), AvgPool2d(2));
    };
  };
  return Family(kImage)
      .add("UpsampleNearest", resized(torch::kNearest))
      .add("UpsampleBilinear", resized(torch::kBilinear))
      .add("UpsampleBicubic", resized(torch::kBicubic))
      .add(
          "PixelShuffle",
          [](int64_t c) {
            return chained(
                Conv2d(Conv2dOptions(c, 4 * c, 1)),
                PixelShuffle(2),
                AvgPool2d(2));
          })
      .add(
          "PixelUnshuffle",
          [](int64_t c) {
            return chained(
                Upsample(
                    UpsampleOptions().scale_factor(std::vector<double>{2, 2})),
                PixelUnshuffle(2),
                Conv2d(Conv2dOptions(4 * c, c, 1)));
          })
      .add("UnfoldAndFold", [](int64_t) {
        return chained(
            Unfold(UnfoldOptions(3).padding(1)),
            Fold(FoldOptions({6, 5}, 3).padding(1)),
            Softsign());
      });
}

Family layers_of_features() {
  return Family(kFeatures)
      .add("Linear", [](int64_t c) { return Linear(c, c); })
      .add("BatchNorm1dOfFeatures", [](int64_t c) { return BatchNorm1d(c); })
      .add("RNNCell", [](int64_t c) { return RNNCell(RNNCellOptions(c, c)); })
      .add(
          "LSTMCell",
          [](int64_t c) { return first_of(LSTMCell(LSTMCellOptions(c, c))); })
      .add("GRUCell", [](int64_t c) { return GRUCell(GRUCellOptions(c, c)); })
      .add(
          "Bilinear",
          [](int64_t c) {
            return adapted(
                Bilinear(BilinearOptions(c, c, c)),
                [](Bilinear& layer, const Tensor& x) {
                  return layer->forward(x, x.tanh());
                });
          })
      .add("Identity", [](int64_t) { return Identity(); })
      .add(
          "EmbeddingBag",
          [](int64_t c) {
            return adapted(
                EmbeddingBag(EmbeddingBagOptions(9, c)),
                [](EmbeddingBag& layer, const Tensor& x) {
                  return layer->forward(
                      x.mul(3).round().clamp(-4, 4).add(4).to(torch::kLong));
                });
          })
      .add("FlattenAndUnflatten", [](int64_t c) {
        return chained(
            Unflatten(UnflattenOptions(1, {c, 1})),
            Linear(1, 3),
            Flatten(),
            Linear(3 * c, c));
      });
}

Family layers_of_tokens() {
  return Family(kTokens)
      .add("LinearOfTokens", [](int64_t c) { return Linear(c, c); })
      .add(
          "LayerNormOfTokens",
          [](int64_t c) { return LayerNorm(LayerNormOptions({c})); })
      .add("Embedding", [](int64_t) {
        return adapted(
            Embedding(EmbeddingOptions(9, 1)),
            [](Embedding& layer, const Tensor& x) {
              return layer
                  ->forward(
                      x.mul(3).round().clamp(-4, 4).add(4).to(torch::kLong))
                  .squeeze(-1);
            });
      });
}

Family compositions() {
  return Family(kImage)
      .add(
          "Functional",
          [](int64_t) {
            return Functional([](const Tensor& x) { return x.sin() * 2; });
          })
      .add(
          "WithoutItsArgument", // but of its parameters
          [](int64_t c) {
            return chained(
                Functional([](const Tensor& x) { return torch::ones_like(x); }),
                Conv2d(Conv2dOptions(c, c, 1)));
          })
      .add(
          "ResNetBranch",
          [](int64_t c) {
            return chained(
                Conv2d(Conv2dOptions(c, c, 3).padding(1).bias(false)),
                BatchNorm2d(c),
                ReLU(ReLUOptions().inplace(true)),
                Dropout(0.3),
                Conv2d(Conv2dOptions(c, c, 3).padding(1)));
          })
      .add_even("BottleneckBranch", [](int64_t c) {
        return chained(
            BatchNorm2d(c),
            ELU(ELUOptions().inplace(true)),
            Conv2d(Conv2dOptions(c, 2 * c, 1).bias(false)),
            InstanceNorm2d(2 * c),
            Dropout2d(0.3),
            Conv2d(Conv2dOptions(2 * c, 2 * c, 3).padding(1).groups(2 * c)),
            Conv2d(Conv2dOptions(2 * c, c, 1)));
      });
}

std::vector<Layer> joined(const std::vector<Family>& families) {
  std::vector<Layer> all;
  for (const Family& family : families) {
    all.insert(all.end(), family.layers().begin(), family.layers().end());
  }
  return all;
}

} // namespace

std::vector<Layer> layers() {
  return joined(
      {convolutions_of_images(),
       convolutions_of_series(),
       convolutions_of_volumes(),
       norms_of_images(),
       norms_of_series(),
       norms_of_volumes(),
       recurrent(),
       attention(),
       dropouts_of_images(),
       dropouts_of_volumes(),
       activations(),
       pooling_of_images(),
       pooling_of_series(),
       pooling_of_volumes(),
       resampling(),
       layers_of_features(),
       layers_of_tokens(),
       compositions()});
}

std::vector<Layer> doubling_layers() {
  return joined(
      {Family(kImage)
           .add(
               "Conv2d",
               [](int64_t c) {
                 return chained(
                     Conv2d(Conv2dOptions(c, 2 * c, 3).padding(1)), Tanh());
               })
           .add(
               "ResNetBranch",
               [](int64_t c) {
                 return chained(
                     Conv2d(Conv2dOptions(c, 2 * c, 3).padding(1).bias(false)),
                     BatchNorm2d(2 * c),
                     Dropout(0.3),
                     Tanh());
               }),
       Family(kSeries).add(
           "Conv1d",
           [](int64_t c) {
             return chained(
                 Conv1d(Conv1dOptions(c, 2 * c, 3).padding(1)), Tanh());
           }),
       Family(kFeatures).add("Linear", [](int64_t c) {
         return chained(Linear(c, 2 * c), Tanh());
       })});
}

} // namespace memcnn_test
