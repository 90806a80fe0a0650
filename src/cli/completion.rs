//! Completions for the shells.
#![expect(
    clippy::format_push_string,
    reason = "a page is made once; what counts is that its code reads like it"
)]

use super::options::{COMMANDS, Completion, OPTIONS, Opt, SHELLS};

pub(crate) fn bash() -> String {
    let names = |chosen: &dyn Fn(&Opt) -> bool| {
        let names: Vec<String> =
            OPTIONS.iter().filter(|opt| chosen(opt)).flat_map(spellings).collect();
        names
    };
    let all = names(&|_| true).join(" ");
    let files = names(&|opt| matches!(opt.completion, Completion::File)).join("|");
    let free =
        names(&|opt| opt.value.is_some() && matches!(opt.completion, Completion::None)).join("|");
    let commands = COMMANDS.each_ref().map(|command| command.name).join(" ");
    let mut choices = String::new();
    for opt in &OPTIONS {
        if let Completion::Choices(values) = opt.completion {
            choices += &format!(
                "        {}) words=\"{}\" ;;\n",
                spellings(opt).join("|"),
                values.join(" ")
            );
        }
    }
    let shells = SHELLS.join(" ");
    format!(
        "\
# bash completion for tcpause
_tcpause() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words
    COMPREPLY=()
    # bash splits --option=value into three words.
    if [[ $word == = ]]; then
        word=
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case $before in
        {files})
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- \"$word\")
            return ;;
        {free}) return ;;
{choices}        completion) words=\"{shells}\" ;;
        *)
            if [[ $word == -* ]]; then
                words=\"{all}\"
            else
                words=\"{commands}\"
            fi ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")
}}
complete -F _tcpause tcpause
"
    )
}

pub(crate) fn zsh() -> String {
    let mut text = "#compdef tcpause\n\n_tcpause() {\n    local -a commands=(\n".to_owned();
    for command in &COMMANDS {
        text += &format!("        '{}:{}'\n", command.name, zsh_text(command.help));
    }
    text += "    )\n    _arguments -s -S \\\n";
    for opt in &OPTIONS {
        let equals = if opt.value.is_some() { "=" } else { "" };
        let names = match opt.short {
            Some(short) => {
                let attached = if opt.value.is_some() { "+" } else { "" };
                format!(
                    "'(-{short} --{long})'{{-{short}{attached},--{long}{equals}}}'",
                    long = opt.long
                )
            }
            None => format!("'--{}{equals}", opt.long),
        };
        let value = match (opt.value, &opt.completion) {
            (None, _) => String::new(),
            (Some(value), Completion::None) => format!(":{value}: "),
            (Some(value), Completion::File) => format!(":{value}:_files"),
            (Some(value), Completion::Choices(values)) => {
                format!(":{value}:({})", values.join(" "))
            }
        };
        text += &format!("        {names}[{}]{value}' \\\n", zsh_text(opt.help));
    }
    let shells = SHELLS.join(" ");
    text += "        '1:command:{_describe command commands}' \\\n";
    text +=
        &format!("        '2:shell:{{[[ $line[1] == completion ]] && compadd {shells}}}'\n}}\n\n");
    text += "if [[ $funcstack[1] == _tcpause ]]; then _tcpause \"$@\"; else compdef _tcpause tcpause; fi\n";
    text
}

pub(crate) fn fish() -> String {
    let mut text = "# fish completion for tcpause\ncomplete -c tcpause -f\n".to_owned();
    for command in &COMMANDS {
        text += &format!(
            "complete -c tcpause -n __fish_use_subcommand -a {} -d {}\n",
            command.name,
            fish_text(command.help)
        );
    }
    let shells = SHELLS.join(" ");
    text +=
        &format!("complete -c tcpause -n '__fish_seen_subcommand_from completion' -a '{shells}'\n");
    for opt in &OPTIONS {
        let short = opt.short.map_or_else(String::new, |short| format!("-s {short} "));
        let value = match (opt.value, &opt.completion) {
            (None, _) => String::new(),
            (Some(_), Completion::None) => "-x ".to_owned(),
            (Some(_), Completion::File) => "-r -F ".to_owned(),
            (Some(_), Completion::Choices(values)) => format!("-x -a '{}' ", values.join(" ")),
        };
        text += &format!(
            "complete -c tcpause {short}-l {} {value}-d {}\n",
            opt.long,
            fish_text(opt.help)
        );
    }
    text
}

/// `-c` and `--config`, or the long name alone.
fn spellings(opt: &Opt) -> Vec<String> {
    opt.short
        .map(|short| format!("-{short}"))
        .into_iter()
        .chain([format!("--{}", opt.long)])
        .collect()
}

/// Text inside single quotes and square brackets.
fn zsh_text(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('[', "\\[")
        .replace(']', "\\]")
        .replace(':', "\\:")
        .replace('\'', "'\\''")
}

/// A word in single quotes.
fn fish_text(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_knows_every_option_and_command() {
        for opt in &OPTIONS {
            assert!(bash().contains(&format!("--{}", opt.long)));
            assert!(zsh().contains(&format!("--{}", opt.long)));
            assert!(fish().contains(&format!("-l {} ", opt.long)));
        }
        for command in &COMMANDS {
            for text in [bash(), zsh(), fish()] {
                assert!(text.contains(command.name));
            }
        }
    }

    #[test]
    fn special_characters_are_quoted() {
        assert_eq!(zsh_text("it's [a]: b"), "it'\\''s \\[a\\]\\: b");
        assert_eq!(fish_text("it's \\"), "'it\\'s \\\\'");
    }
}
