"""DPBatchNormalization in stock Keras models that optimizers of tensorflow-privacy train, on tf_keras.

tensorflow-privacy's vectorized optimizers clip and noise gradients inside a stock `tf.keras.Model`, whose train step
knows nothing of batch statistics. `StatisticsCallback` makes up for that: it brings public statistics up to the weights
before each step, lets the layers release noised ones, and counts both together with the optimizer's noise.

    plan = tf_dpbn.PrivacyPlan(...)
    optimizer = VectorizedDPKerasSGDOptimizer(
        l2_norm_clip=1.0, noise_multiplier=tf_dpbn.interop.noise_multipliers(plan, model)[0], learning_rate=0.25)
    model.compile(optimizer, loss=tf.keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=tf.keras.losses.Reduction.NONE))
    callback = tf_dpbn.interop.StatisticsCallback.from_plan(plan, public_batch=...)
    model.fit(plan.poisson_dataset(x, y), epochs=..., callbacks=[callback])
    print(callback.privacy_statement())

tensorflow-privacy is not imported here: what is needed of its optimizers is read off them. docs/migration.md says what
this route lacks beside DPModel.
"""

from tf_dpbn.interop.callback import StatisticsCallback, noise_multipliers

__all__ = ["StatisticsCallback", "noise_multipliers"]
