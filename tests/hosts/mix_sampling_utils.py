"""A miniature of MixGRPO's sampling utilities (V2), restated from their formulas; see `V2` for how V1 is made of it."""

import math

import torch

V2 = True


def noise_of(like, generator):
    if generator is None:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)
    return torch.randn(like.shape, dtype=like.dtype, generator=generator)


def mean_over_elements(density):
    return density.flatten(1).mean(1)


def normal(value, mean, std):
    return mean_over_elements(-((value.detach() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi))


def cps(x, v, here, there, level):
    std = there * math.sin(level * math.pi / 2)
    clean = x - here * v
    return clean * (1 - there) + (x + v * (1 - here)) * (there**2 - std**2).sqrt(), std, clean


def flow_grpo_step(
    model_output, latents, eta, sigmas, index, prev_sample, generator=None, determistic=False,
    sde_type="sde", noise_level=None
):  # fmt: skip
    here, there = sigmas[index], sigmas[index + 1]
    change = there - here
    if sde_type == "cps":
        mean, injected, clean = cps(latents, model_output, here, there, 0.8 if noise_level is None else noise_level)
    else:
        level = eta if noise_level is None else noise_level
        std = level * (here / (1 - (sigmas[1] if here == 1 else here))).sqrt()
        injected, clean = std * (-change).sqrt(), latents - here * model_output
        drift = std**2 / (2 * here)
        mean = latents * (1 + drift * change) + model_output * (1 + drift * (1 - here)) * change
    if prev_sample is None:
        prev_sample = mean + injected * noise_of(model_output, generator)
    if determistic:
        prev_sample = latents + change * model_output
    if sde_type == "cps":
        return prev_sample, clean, mean_over_elements(-((prev_sample.detach() - mean) ** 2)), mean, injected
    return prev_sample, clean, normal(prev_sample, mean, injected), mean, injected


def dance_grpo_step(
    model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver,
    sde_type="sde", noise_level=None
):  # fmt: skip
    here, there = sigmas[index], sigmas[index + 1]
    change = there - here
    if sde_type == "cps":
        mean, spread, clean = cps(latents, model_output, here, there, 0.8 if noise_level is None else noise_level)
    else:
        level = eta if noise_level is None else noise_level
        spread = level * (-change).sqrt()
        clean = latents - here * model_output
        mean = latents + change * model_output
        if sde_solver:
            mean = mean - 0.5 * level**2 * change * ((1 - here) * clean - latents) / here**2
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + spread * torch.randn_like(mean) if sde_solver else mean
    wide = torch.promote_types(mean.dtype, torch.float32)
    square = (prev_sample.detach().to(wide) - mean.to(wide)) ** 2
    return prev_sample, clean, mean_over_elements(-square if sde_type == "cps" else -square / (2 * spread**2))


class DPMState:
    def __init__(self, order):
        self.order, self.lower_order_nums = order, 0
        self.model_outputs = [None] * order

    def update(self, model_output):
        self.model_outputs = self.model_outputs[1:] + [model_output]

    def update_lower_order(self):
        self.lower_order_nums = min(self.order, self.lower_order_nums + 1)


def weight_of_change(kind, alpha, h):
    if kind == "midpoint":
        return alpha * (1 - torch.exp(-h)) / 2
    return alpha * (1 - (1 - torch.exp(-h)) / h)


def dpm_step(
    args,
    model_output,
    sample,
    step_index,
    timesteps,
    sigmas,
    dpm_state=None,
    generator=None,
    variance_noise=None,
    sde_solver=False,
):
    here, there = sigmas[step_index], sigmas[step_index + 1]
    clean = sample - here * model_output
    if dpm_state is not None:
        dpm_state.update(clean)
    lam = [torch.log(1 - s) - torch.log(s) for s in (there, here, sigmas[step_index - 1])]
    h, alpha = lam[0] - lam[1], 1 - there
    mean = there / here * torch.exp(-h) * sample + alpha * (1 - torch.exp(-2 * h)) * clean
    ode = there / here * sample + alpha * (1 - torch.exp(-h)) * clean
    last = step_index == len(timesteps) - 1
    if dpm_state is not None and args.dpm_solver_order == 2 and dpm_state.lower_order_nums >= 1 and not last:
        slope = (clean - dpm_state.model_outputs[-2]) * h / (lam[1] - lam[2])
        mean = mean + weight_of_change(args.dpm_solver_type, alpha, 2 * h) * slope
        ode = ode + weight_of_change(args.dpm_solver_type, alpha, h) * slope
    std = there * (1 - torch.exp(-2 * h)).sqrt()
    state = ode
    if sde_solver:
        noise = noise_of(ode, generator) if variance_noise is None else variance_noise
        state = mean + std * noise
    if dpm_state is not None:
        dpm_state.update_lower_order()
    return state, clean, normal(state, mean, std)


def run_sample_step(
    args,
    z,
    progress_bar,
    sigma_schedule,
    transformer,
    encoder_hidden_states,
    pooled_prompt_embeds,
    text_ids,
    image_ids,
    grpo_sample,
    determistic,
):
    states, log_probs = [z], []
    memory, last = None, None
    if args.dpm_algorithm_type != "null":
        memory = DPMState(args.dpm_solver_order)
        if args.dpm_apply_strategy == "post":
            last = max(place for place, flag in enumerate(determistic) if not flag)
            count = int(max((len(sigma_schedule) - 1 - last) * args.dpm_post_compress_ratio, 1))
            rest = torch.linspace(torch.linspace(1, 0, len(sigma_schedule))[last + 1].item(), 0, count)
            rest = args.shift * rest / (1 + (args.shift - 1) * rest)
            sigma_schedule = torch.cat([sigma_schedule[: last + 1], rest])
            progress_bar = range(len(sigma_schedule) - 1)
    more = (
        {"sde_type": getattr(args, "sde_type", "sde"), "noise_level": getattr(args, "noise_level", None)} if V2 else {}
    )
    for i in progress_bar:
        time = torch.full((len(encoder_hidden_states),), int(sigma_schedule[i] * 1000), dtype=torch.long) / 1000
        transformer.eval()
        velocity = transformer(
            hidden_states=z,
            encoder_hidden_states=encoder_hidden_states,
            timestep=time,
            guidance=torch.tensor([3.5], dtype=torch.bfloat16),
            txt_ids=text_ids.repeat(encoder_hidden_states.shape[1], 1),
            pooled_projections=pooled_prompt_embeds,
            img_ids=image_ids,
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        x = z.to(torch.promote_types(z.dtype, torch.float32))
        noisy = not determistic[i] if i < len(determistic) else False
        if memory is not None and args.dpm_apply_strategy == "all":
            fresh = torch.Generator()
            z, clean, log_prob = dpm_step(
                args, velocity, x, i, sigma_schedule[:-1], sigma_schedule, memory, fresh, sde_solver=noisy
            )
        elif memory is not None and i > last:
            z, clean, log_prob = dpm_step(args, velocity, x, i, sigma_schedule[:-1], sigma_schedule, memory)
        elif args.flow_grpo_sampling:
            if memory is not None:
                memory.update(x - sigma_schedule[i] * velocity)
                memory.update_lower_order()
            z, clean, log_prob, _, _ = flow_grpo_step(
                velocity, x, args.eta, sigma_schedule, i, None, determistic=not noisy, **more
            )
        else:
            z, clean, log_prob = dance_grpo_step(velocity, x, args.eta, sigma_schedule, i, None, True, noisy, **more)
        states.append(z)
        log_probs.append(log_prob)
    return z, clean if args.drop_last_sample else z, torch.stack(states, 1), torch.stack(log_probs, 1)
