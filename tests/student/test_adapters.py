import torch

from movekd.student.adapters import StudentHead, TeacherAdapter


def test_teacher_adapter_maps_channels_then_tokens() -> None:
    torch.manual_seed(0)
    adapter = TeacherAdapter(
        teacher_channels=3, teacher_tokens=6, student_channels=5, student_tokens=4
    )
    tokens = torch.randn(2, 6, 3)
    found = adapter(tokens)
    assert found.shape == (2, 4, 5)
    for b in range(2):
        hidden = torch.stack(
            [
                torch.nn.functional.gelu(
                    adapter.channels.weight @ tokens[b, m] + adapter.channels.bias
                )
                for m in range(6)
            ]
        )
        for d in range(5):
            expected = adapter.tokens.weight @ hidden[:, d] + adapter.tokens.bias
            torch.testing.assert_close(found[b, :, d], expected)


def test_teacher_adapter_holds_the_official_parameters() -> None:
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in TeacherAdapter(7, 9, 5, 4).named_parameters()
    }
    assert shapes == {
        "channels.weight": (5, 7),
        "channels.bias": (5,),
        "tokens.weight": (4, 9),
        "tokens.bias": (4,),
    }


def test_student_head_sees_each_token_alone_and_not_its_scale() -> None:
    torch.manual_seed(0)
    head = StudentHead(student_channels=6, teacher_channels=3)
    assert head.hidden.out_features == 6
    assert StudentHead(6, 3, hidden_channels=11).hidden.out_features == 11
    tokens = torch.randn(2, 4, 6)
    found = head(tokens)
    assert found.shape == (2, 4, 3)
    torch.testing.assert_close(head(tokens[:, [2]]), found[:, [2]])
    torch.testing.assert_close(head(tokens * 100), found, atol=1e-4, rtol=1e-4)
    normal = (tokens - tokens.mean(-1, keepdim=True)) / (
        tokens.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    hidden = torch.nn.functional.gelu(normal @ head.hidden.weight.T + head.hidden.bias)
    torch.testing.assert_close(found, hidden @ head.output.weight.T + head.output.bias)
